"""TorchScript: what it compiles predicts what eager mode does, and leaves the model as usable as it was."""

import copy

import pytest
import timm
import torch

import dg_timm
from dg_timm.conversion.state_dict import is_identity
from dg_timm.graph.stage import DGStage, graph_stages
from tests.helpers.networks import FAMILIES, randomize, randomize_graph
from tests.helpers.stages import images, make_stage

SIZE = (3, 64, 64)


@pytest.fixture
def model():
    return randomize_graph(randomize(timm.create_model("dg_resnet18", num_classes=3)))


@pytest.mark.parametrize("options", [{}, {"block_shortcut": False}, {"edge_scale": False, "block_shortcut": False},
                                     {"instance_aware": False}])  # fmt: skip
@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_a_scripted_stage_is_the_stage(kind, options):
    for num_blocks in (1, 4):
        stage, x = make_stage(kind, num_blocks, **options), images(kind)
        with torch.no_grad():
            wanted = stage(x)
            torch.testing.assert_close(torch.jit.script(stage)(x), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_scripted_network_is_the_network(name):
    model = randomize_graph(randomize(timm.create_model(name, num_classes=3)))
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for batch in (1, 3):
            x = torch.randn(batch, *SIZE)
            torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)


def test_scripting_leaves_the_model_usable(model):
    x, keys = torch.randn(2, *SIZE), list(model.state_dict())
    alphas, cost = dg_timm.adjacency(model, x), dg_timm.cost(model, x)
    with torch.no_grad():
        wanted = model(x)
        torch.jit.script(model)
        assert torch.equal(model(x), wanted)
        assert list(model.state_dict()) == keys
        assert all(isinstance(stage, DGStage) for stage in graph_stages(model).values())
        assert list(graph_stages(model)) == ["layer1", "layer2", "layer3", "layer4"]
        after = dg_timm.adjacency(model, x)
        assert all(torch.equal(after[name], alphas[name]) for name in alphas)
        assert torch.equal(dg_timm.cost(model, x), cost)
        for execution in ("sparse", "dense"):
            dg_timm.set_execution(model, execution)
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
        every = {name: torch.ones(alpha[0].shape).triu(1).bool() for name, alpha in alphas.items()}
        dg_timm.set_execution(model, "fixed", every)
        torch.testing.assert_close(model(x), wanted)
        dg_timm.set_execution(model, "dense")
        assert torch.equal(copy.deepcopy(model)(x), wanted)
        torch.testing.assert_close(torch.jit.script(model)(x), wanted, rtol=1e-4, atol=1e-4)  # once more
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    static = timm.create_model("resnet18", num_classes=3)
    torch.nn.Sequential(model).load_state_dict(torch.nn.Sequential(static).state_dict())
    assert is_identity(model)


def test_a_scripted_model_trains_as_the_model_does(model):
    model = model.double()
    x = torch.randn(2, *SIZE, dtype=torch.float64)
    scripted = torch.jit.script(model)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(scripted(x).square().sum(), list(scripted.parameters()))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-6, atol=1e-8)


def test_sparse_execution_is_refused_before_and_after_scripting(model):
    dg_timm.set_execution(model, "sparse")
    with pytest.raises(RuntimeError, match=r"sparse execution can't be scripted; .*set_execution\(model, 'dense'\)"):
        torch.jit.script(model)
    dg_timm.set_execution(model, "dense")
    torch.jit.script(model)
    dg_timm.set_execution(model, "sparse")
    with pytest.raises(RuntimeError, match="sparse execution can't be scripted"):
        torch.jit.script(model)
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        sparse = model(x)
        dg_timm.set_execution(model, "dense")
        torch.testing.assert_close(model(x), sparse, rtol=1e-4, atol=1e-4)


def test_a_scripted_model_is_saved_and_loaded(model, tmp_path):
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        loaded = torch.jit.load(str(tmp_path / "model.pt"))
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)
