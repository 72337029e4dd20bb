"""Sparse execution against dense: any pattern of closed edges, any batch, every family."""

import pytest
import timm
import torch
import torch.nn.utils.prune
from torch import nn

import dg_timm
from dg_timm.execution import operators, sparse_states
from dg_timm.graph.router import Router
from dg_timm.graph.stage import graph_stages, routers
from dg_timm.graph.topology import complete
from tests.helpers.networks import BIG, FAMILIES, close_at_random, randomize, randomize_graph
from tests.helpers.stages import images, make_stage


@pytest.mark.parametrize("openness", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("num_blocks", [1, 2, 6])
@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
@pytest.mark.parametrize("by", ["kernels", "image", "source"])
def test_equals_dense(kind, num_blocks, batch, openness, by, monkeypatch):
    if by == "source":  # as on other devices
        monkeypatch.setattr(sparse_states, "_scatter_per_image", sparse_states._scatter_per_source)
    for seed in range(3):
        torch.manual_seed(seed)
        stage, x = make_stage(kind, num_blocks), images(kind, batch)
        close_at_random(stage, openness)
        with torch.no_grad(), operators.using_backend("kernels" if by == "kernels" else "torch"):
            wanted = stage(x)
            stage.execution = "sparse"
            torch.testing.assert_close(stage(x), wanted, rtol=1e-10, atol=1e-10)


def test_the_patterns_above_are_of_every_kind():
    open_edges, removed, differ = [], 0, 0
    for openness in (0.0, 0.3, 0.6, 1.0):
        torch.manual_seed(0)
        stage = make_stage("input", 6)
        close_at_random(stage, openness)
        alpha = dg_timm.adjacency(stage, images("input", 7))[""]
        open_edges.append(float((alpha != 0).sum()))
        removed += int((alpha[:, :, 1:-1] == 0).all(1).sum())
        differ += int(((alpha != 0) != (alpha[:1] != 0)).any())
    assert open_edges == sorted(open_edges)
    assert open_edges[0] < 0.5 * open_edges[-1]
    assert removed > 3
    assert differ >= 2


@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_a_removed_block_is_not_run_and_an_image_may_skip_all(kind):
    stage, x = make_stage(kind, 4), images(kind, 3)
    ran = dict.fromkeys(stage.block_names, 0)

    def count(name):
        return lambda module, args: ran.__setitem__(name, ran[name] + len(args[0]))

    for name in stage.block_names:  # a block that projects is called, and stops there
        layers = stage.get_submodule(name).named_modules()
        conv = next(layer for key, layer in layers if isinstance(layer, nn.Conv2d) and "downsample" not in key)
        conv.register_forward_pre_hook(count(name))
    with torch.no_grad():
        for node in range(5):  # of every node only the edge to the output is open
            router = stage.get_submodule(f"router{node}")
            router.fc.weight.zero_()
            router.fc.bias.fill_(-BIG)
            router.fc.bias[-1] = BIG
            router.scale.fill_(1.0)
            router.threshold.fill_(0.5)
        wanted = stage(x)
        assert set(ran.values()) == {3}
        ran.update(dict.fromkeys(ran, 0))
        stage.execution = "sparse"
        got = stage(x)
    torch.testing.assert_close(got, wanted)
    assert set(ran.values()) == {0}


def test_all_edges_into_the_output_closed_gives_zeros():
    stage, x = make_stage("input", 3), images("input", 2)
    with torch.no_grad():
        for router in routers(stage).values():
            router.threshold.fill_(BIG)
        stage.execution = "sparse"
        assert (stage(x) == 0).all()
        assert stage(x).shape == x.shape


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", FAMILIES)
def test_whole_networks(name, memory_format):
    model = randomize(timm.create_model(name, num_classes=10)).to(memory_format=memory_format)
    for openness in (0.5, 1.0):
        close_at_random(model, openness)
        x = torch.randn(3, 3, 64, 64).contiguous(memory_format=memory_format)
        with torch.inference_mode():
            dg_timm.set_execution(model, "dense")
            wanted = model(x)
            dg_timm.set_execution(model, "sparse")
            got = model(x)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    stage, x = make_stage("shortcut", 4, dtype=torch.float32).to(dtype), images("shortcut", dtype=dtype)
    dg_timm.set_threshold(stage, 0.05)
    with torch.no_grad():
        wanted = stage(x)
        stage.execution = "sparse"
        torch.testing.assert_close(stage(x), wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())


def test_adjacency_sees_the_dense_graph_whatever_the_execution():
    """Weights of edges, and the cost of sparse execution, are asked for while the model runs in another way."""
    model = randomize(randomize_graph(timm.create_model("dg_regnetx_002", num_classes=3), spread=20.0))
    dg_timm.set_threshold(model, 0.4)
    x = torch.randn(4, 3, 64, 64) * torch.tensor([0.2, 1.0, 2.0, 4.0]).view(4, 1, 1, 1)
    alphas, cost = dg_timm.adjacency(model, x), dg_timm.cost(model, x)
    assert any((alpha != alpha[:1]).any() for alpha in alphas.values())
    chain = {name: torch.ones(len(stage) + 1).diag(1).bool() for name, stage in graph_stages(model).items()}
    for execution, topology in (("sparse", None), ("fixed", chain), ("dense", None)):
        dg_timm.set_execution(model, execution, topology)
        found = dg_timm.adjacency(model, x)
        assert found.keys() == alphas.keys()
        assert all(torch.equal(found[name], alphas[name]) for name in alphas), execution
        assert torch.equal(dg_timm.cost(model, x), cost) == (execution != "fixed")  # where every image costs the same
        assert all(stage.execution == execution for stage in graph_stages(model).values())


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_an_image_that_is_not_a_number_stays_one(execution):
    """A weight that is not a number is not below a threshold: a corrupt image must not pass as a prediction."""
    model = timm.create_model("dg_regnetx_002", num_classes=3).eval()
    dg_timm.set_execution(model, execution)
    x = torch.randn(3, 3, 64, 64)
    x[1] = float("nan")
    with torch.no_grad():
        out = model(x)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge_scale", [True, False])
@pytest.mark.parametrize("topology", [complete(4), [[], [0], [0], [1], [2], [0, 3, 4]]])
def test_edges_weighed_in_one_call_are_the_routers(dtype, edge_scale, topology, monkeypatch):
    router = Router(37, 0, topology, edge_scale, dtype=dtype)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn_like(parameter))
        router.threshold.fill_(0.5)
    maps = torch.randn(3, 37, 5, 5, dtype=dtype)

    def weighed():
        state = sparse_states.start_state(maps, len(topology), gates=False)
        assert isinstance(state, sparse_states.ByKernels)
        state.finish(0, maps, router)
        assert not state.native.alpha[:, 1:].any()
        return state.native.alpha[:, 0, router.targets]

    for fixed in (None, 0.0, 0.3):
        router.fixed_threshold = fixed
        wanted = router(maps.mean((2, 3)))
        assert fixed == 0.0 or (wanted == 0).any()
        called = []
        handle = router.register_forward_pre_hook(lambda *_, seen=called: seen.append(1))
        hooked = weighed()  # somebody watches the router: it is called
        handle.remove()
        assert called == [1]
        monkeypatch.setattr(Router, "forward", lambda *_: pytest.fail("the router was called"))
        rows = weighed()
        monkeypatch.undo()
        for found in (rows, hooked):
            assert torch.allclose(found, wanted, atol=1e-6)
            assert torch.equal(found == 0, wanted == 0)


def test_a_router_whose_weight_is_computed_is_asked():
    stage, x = make_stage("input", 3, dtype=torch.float32), images("input", dtype=torch.float32)
    torch.nn.utils.parametrizations.weight_norm(stage.router1.fc)
    torch.nn.utils.prune.random_unstructured(stage.router2.fc, "weight", 0.5)
    routers = [stage.get_submodule(f"router{n}") for n in range(4)]
    assert [sparse_states.plain_parameters(router, x.dtype, x.shape[1]) is None for router in routers] == [
        False,
        True,
        True,
        False,
    ]
    with torch.no_grad():
        wanted = stage(x)
        stage.execution = "sparse"
        torch.testing.assert_close(stage(x), wanted)
