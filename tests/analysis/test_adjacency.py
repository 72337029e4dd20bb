"""The weights of the edges of each image, and the model that is asked, which stays as it was."""

import contextlib

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


def test_the_adjacency_is_that_of_the_pass_that_is_recorded(model):
    x, other = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 64, 64)
    wanted = dg_timm.adjacency(model, x)
    with torch.no_grad(), dg_timm.record_adjacency(model) as recorded:
        assert recorded == {}
        model(other)
        model(x)  # the last pass counts
    assert list(recorded) == list(wanted)
    assert all(torch.equal(recorded[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        model(other)  # after the block nothing is recorded
    assert len(recorded["s1"]) == 2


def test_what_is_recorded_of_each_router_is_the_callers_choice(model):
    x = torch.randn(2, 3, 64, 64)

    def logits(router, pooled, row):
        return torch.stack([router.compute_logits(pooled), row], dim=2)

    with torch.no_grad(), dg_timm.record_adjacency(model, logits) as recorded:
        model(x)
    alphas = dg_timm.adjacency(model, x)
    for name, both in recorded.items():
        assert both.shape == (*alphas[name].shape, 2)
        assert torch.equal(both[..., 1], alphas[name])
        assert both[..., 0].any()


def test_recording_needs_dense_execution(model):
    dg_timm.set_execution(model, "sparse")
    with pytest.raises(ValueError, match="recorded in dense execution"), dg_timm.record_adjacency(model):
        pass
    with pytest.raises(ValueError, match="is a static network"), dg_timm.record_adjacency(torch.nn.Linear(1, 1)):
        pass


def test_recording_a_pass_that_learns_changes_no_gradient(model):
    x, found = torch.randn(2, 3, 64, 64), []
    for recording in (False, True):
        model.zero_grad()
        with dg_timm.record_adjacency(model) if recording else contextlib.nullcontext({}) as recorded:
            model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        assert all(not alpha.requires_grad for alpha in recorded.values())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_removed_node_has_no_edges(model):
    dg_timm.set_threshold(model, 0.4)
    removed = 0
    for alpha in dg_timm.adjacency(model, torch.randn(4, 3, 64, 64)).values():
        dead = (alpha[:, :, 1:-1] == 0).all(1)
        assert (alpha[:, 1:-1][dead] == 0).all()
        removed += int(dead.sum())
    assert removed > 0
