"""Detectors over static and dynamic backbones, and their loss."""

import numpy as np
import pytest
import torch

from dg_timm.detection.data.loading import DetectionCollate, DetectionImages, make_transform
from dg_timm.detection.detectors import DETECTORS
from dg_timm.detection.objective import DetectionObjective
from dg_timm.graph.stage import graph_stages
from dg_timm.training.data.samplers import SampleKey
from tests.helpers.detection import SMALL, images_of, make_detector, save_classifier


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_050", "regnetx_002"])
@pytest.mark.parametrize("kind", DETECTORS)
def test_a_converted_backbone_detects_exactly_what_the_static_one_does(kind, backbone, pages, tmp_path):
    file = save_classifier(backbone, tmp_path)
    static, dynamic = (
        make_detector(kind, name, initial_checkpoint=file).eval() for name in (backbone, f"dg_{backbone}")
    )
    assert graph_stages(dynamic)
    assert not graph_stages(static)
    for one in (static, dynamic):
        (one.roi_heads if kind == "faster_rcnn" else one).score_thresh = 0.0  # random weights find nothing else
    images = images_of(pages.test, 3)
    images[1] = images[1][:, :70, :90]
    with torch.inference_mode():
        wanted, got = static(images), dynamic(images)
    assert sum(len(one["boxes"]) for one in wanted) > 10
    for one, other in zip(wanted, got, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key])


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_batch_with_and_without_boxes_has_a_loss(kind, pages):
    one = make_detector(kind).train()
    collate = DetectionCollate(2)
    images = DetectionImages(pages.train._replace(rows=[
        pages.train.rows[0]._replace(labels=np.ones_like(pages.train.rows[0].labels)),
        pages.train.rows[1]._replace(boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64),
                                     crowd=np.zeros(0, bool)),
    ]), make_transform())  # fmt: skip
    both = collate([images[SampleKey(0, 0, 0)], images[SampleKey(0, 0, 1)]])
    empty = collate([images[SampleKey(0, 0, 1)], images[SampleKey(0, 0, 1)]])
    for batch in (both, empty, both.masked_out()):
        one.zero_grad()
        losses = DetectionObjective(0)(one, batch, 1)
        (losses.loss * batch.sample_mask).sum().backward()
        assert torch.isfinite(losses.loss).all()
        assert losses.loss.shape == (2,)
        assert losses.loss[0].item() == pytest.approx(sum(v[0].item() for v in losses.metrics.values()), rel=1e-5)
        missing = [name for name, p in one.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing  # processes under DDP wait for every gradient


def test_the_loss_depends_on_update_and_seed_alone(pages):
    one = make_detector().train()
    for module in one.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = DetectionImages(pages.train, make_transform())
    rows_ = [images[SampleKey(0, 0, k)] for k in range(2)]
    for row in rows_:
        row[1]["labels"].clamp_(max=2)
    batch = DetectionCollate(2)(rows_)
    first = DetectionObjective(0)(one, batch, 4).loss
    torch.rand(3)
    assert torch.equal(DetectionObjective(0)(one, batch, 4).loss, first)
    assert not torch.equal(DetectionObjective(1)(one, batch, 4).loss, first)


@pytest.mark.parametrize(
    "kind", [kind if kind == "faster_rcnn" else pytest.param(kind, marks=pytest.mark.slow) for kind in DETECTORS]
)
def test_in_bfloat16_boxes_are_as_fine_as_ever(kind, pages):
    """Heads run in float32: in bfloat16 a box above 256 px would lie on a grid of 2 px."""
    one = make_detector(kind, options=SMALL._replace(min_size=(384,), max_size=512)).eval()
    one.backbone.precision = torch.bfloat16
    (one.roi_heads if kind == "faster_rcnn" else one).score_thresh = 0.0
    image = images_of(pages.test, 1)[0]
    image = torch.nn.functional.interpolate(image[None], (384, 512))[0]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # as Accelerate wraps it
        found = one([image])[0]
        assert one.backbone.body(image[None])[0].dtype == torch.bfloat16
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    inside = found["boxes"][(found["boxes"] > 256) & (found["boxes"] < 380)]
    assert len(inside) > 5
    assert ((inside % 2) != 0).float().mean() > 0.2
