"""Looking at the wiring, and setting its threshold."""

import math

import pytest
import timm
import torch

import dg_timm
from dg_timm.graph.stage import graph_stages, routers
from tests.helpers.networks import FAMILIES, randomize, randomize_graph


@pytest.fixture
def model():
    return randomize_graph(randomize(timm.create_model("dg_regnetx_002", num_classes=3)))


@pytest.mark.parametrize("name", FAMILIES)
def test_adjacency_has_a_strictly_upper_triangular_matrix_for_every_image_and_stage(name):
    torch.manual_seed(1)  # with 0 the first stage of resnet18 is closed, and all images look alike behind it
    model = randomize_graph(randomize(timm.create_model(name)))
    alpha = dg_timm.adjacency(model, torch.randn(3, 3, 64, 64))
    stages = graph_stages(model)
    assert list(alpha) == list(stages)
    for stage, matrix in alpha.items():
        nodes = len(stages[stage].block_names) + 2
        assert matrix.shape == (3, nodes, nodes)
        assert torch.equal(matrix, matrix.triu(1))
        assert not matrix.requires_grad
    assert any(not torch.equal(matrix[0], matrix[1]) for matrix in alpha.values())  # per image


def test_adjacency_leaves_the_model_as_it_was(model):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dg_timm.adjacency(model, torch.randn(2, 3, 64, 64))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # BatchNorm's too
    assert not any(r._forward_hooks for r in routers(model).values())


def test_adjacency_of_a_static_model():
    with pytest.raises(ValueError, match=r"ResNet is a static network; convert it with dg_timm.dynamize"):
        dg_timm.adjacency(timm.create_model("resnet18"), torch.randn(1, 3, 64, 64))
    with pytest.raises(TypeError, match=r"images must be a tensor .*, got list"):
        dg_timm.adjacency(timm.create_model("dg_resnet18"), [1, 2])


def test_a_higher_threshold_closes_more_and_none_returns_to_the_learned_one(model):
    x = torch.randn(2, 3, 64, 64)
    learned = model(x)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    open_edges = []
    for threshold in (0, 0.1, 0.3, 1.0, 100):
        dg_timm.set_threshold(model, threshold)
        alpha = dg_timm.adjacency(model, x)
        open_edges.append(sum(int((a != 0).sum()) for a in alpha.values()))
        assert all(((a == 0) | (a.abs() >= threshold)).all() for a in alpha.values())
    assert open_edges == sorted(open_edges, reverse=True)
    assert open_edges[0] > open_edges[2] > open_edges[-1] == 0
    assert not torch.equal(model(x), learned)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    dg_timm.set_threshold(model, None)
    assert torch.equal(model(x), learned)


@pytest.mark.parametrize(
    ("bad", "error"),
    [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("0.1", TypeError), (True, TypeError)],
)
def test_bad_thresholds_change_nothing(model, bad, error):
    dg_timm.set_threshold(model, 0.25)
    with pytest.raises(error, match="threshold must be"):
        dg_timm.set_threshold(model, bad)
    assert all(router.fixed_threshold == 0.25 for router in routers(model).values())
    with pytest.raises(ValueError, match="static network"):
        dg_timm.set_threshold(timm.create_model("resnet18"), 0.1)


def test_the_picture_is_a_picture(model, tmp_path):
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
