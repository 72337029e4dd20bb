"""Real ImageNet weights, which are not in the repository: the converted network predicts what timm's predicts."""

import os
from pathlib import Path

import pytest
import timm
import torch

_SHARED = Path(os.environ.get("DG_TIMM_DATA", Path(__file__).parents[3] / "shared" / "data"))
WEIGHTS = _SHARED / "efficientnet_lite0" / "model.safetensors"


@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"no real weights at {WEIGHTS}; set DG_TIMM_DATA")
def test_efficientnet_lite0_predicts_as_the_static_one():
    overlay = dict(file=str(WEIGHTS))
    static = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    dynamic = timm.create_model("dg_tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    from sklearn.datasets import load_sample_images

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(dynamic))
    from PIL import Image

    photos = torch.stack([transform(Image.fromarray(image)) for image in load_sample_images().images])
    images = torch.cat([photos, photos.flip(-1), torch.randn(4, *photos.shape[1:])])
    with torch.no_grad():
        wanted = static(images)
        assert torch.equal(dynamic(images), wanted)
    assert wanted[:2].argmax(1).tolist() == [698, 985]  # palace, daisy: the weights are real
