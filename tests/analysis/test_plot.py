"""Pictures of the adjacency of some images."""

import pytest
import timm
import torch

import dg_timm
from tests.helpers.networks import randomize, randomize_graph


@pytest.fixture
def model():
    return randomize_graph(randomize(timm.create_model("dg_regnetx_002", num_classes=3)))


def test_the_picture_is_a_picture(model, tmp_path):
    pytest.importorskip("matplotlib")  # the contract tests run without the extras
    pytest.importorskip("networkx")
    from PIL import Image

    x = torch.randn(3, 3, 64, 64)
    path = dg_timm.draw_wiring(
        dg_timm.adjacency(model, x), tmp_path / "new" / "wiring.png", images=x, titles=list("abc")
    )
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert len(picture.getcolors(maxcolors=1 << 20)) > 50  # arcs, not a blank sheet
    assert [p.name for p in path.parent.iterdir()] == ["wiring.png"]
    with pytest.raises(ValueError, match="2 titles for 3 adjacency matrices"):
        dg_timm.draw_wiring(dg_timm.adjacency(model, x), path, titles=["a", "b"])
