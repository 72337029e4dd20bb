"""Sparse execution against dense: any pattern of closed edges, any batch, every family; and what it refuses."""

import pytest
import timm
import torch
import torch.nn.utils.prune

import dg_timm
from dg_timm.execution import aggregation, sparse
from dg_timm.graph import edges as graph
from dg_timm.graph.router import Router
from dg_timm.graph.stage import DGStage
from tests.helpers.networks import BIG, FAMILIES, close_at_random, randomize
from tests.helpers.stages import images, make_stage


@pytest.mark.parametrize("openness", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("num_blocks", [1, 2, 6])
@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
@pytest.mark.parametrize("by", ["kernels", "by_image", "by_source"])
def test_equals_dense(kind, num_blocks, batch, openness, by, monkeypatch):
    if by != "kernels":
        monkeypatch.setattr(aggregation, "kernels_for", lambda like: None)
        monkeypatch.setattr(sparse, "_by_image", getattr(sparse, f"_{by}"))
    for seed in range(3):
        torch.manual_seed(seed)
        stage, x = make_stage(kind, num_blocks), images(kind, batch)
        close_at_random(stage, openness)
        with torch.no_grad():
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

    for name in stage.block_names:
        stage.get_submodule(name).register_forward_pre_hook(count(name))
    with torch.no_grad():
        for node in range(5):  # of every node only the edge to the output is open
            router = stage.get_submodule(f"router{node}")
            router.fc.weight.zero_()
            router.fc.bias.fill_(-BIG)
            router.fc.bias[-1] = BIG
            router.scale.fill_(1.0)
            router.threshold.fill_(0.5)
        wanted = stage(x)
        ran.update(dict.fromkeys(ran, 0))
        stage.execution = "sparse"
        got = stage(x)
    torch.testing.assert_close(got, wanted)
    assert set(ran.values()) == {0}


def test_all_edges_into_the_output_closed_gives_zeros():
    stage, x = make_stage("input", 3), images("input", 2)
    with torch.no_grad():
        for router in dg_timm.graph.stage.routers(stage).values():
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
            wanted, alphas = model(x), dg_timm.adjacency(model, x)
            dg_timm.set_execution(model, "sparse")
            got = model(x)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    dg_timm.set_execution(model, "dense")
    assert alphas.keys() == dg_timm.graph.stage.graph_stages(model).keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    stage, x = make_stage("shortcut", 4, dtype=torch.float32).to(dtype), images("shortcut", dtype=dtype)
    dg_timm.set_threshold(stage, 0.05)
    with torch.no_grad():
        wanted = stage(x)
        stage.execution = "sparse"
        torch.testing.assert_close(stage(x), wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())


def test_adjacency_sees_the_dense_graph_whatever_the_execution():
    model = randomize(timm.create_model("dg_regnetx_002", num_classes=3))
    close_at_random(model, 0.5)
    x = torch.randn(4, 3, 64, 64)
    wanted, cost = dg_timm.adjacency(model, x), dg_timm.cost(model, x)
    found = dg_timm.adjacency(model, x)
    assert all(torch.equal(found[name] != 0, wanted[name] != 0) for name in wanted)
    assert torch.equal(dg_timm.cost(model, x), cost)


# --------------------------------------------------------------------------- refusals


@pytest.fixture
def model():
    made = timm.create_model("dg_regnetx_002", num_classes=3).eval()
    dg_timm.set_execution(made, "sparse")
    return made


# --------------------------------------------------------------------------- where nothing may be read


def test_what_records_or_transforms_a_program_is_refused(model):
    """What is read of one image would hold for all; and what has no memory must not be read."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.testing._internal.two_tensor import TwoTensor

    x = torch.randn(2, 3, 64, 64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        with pytest.raises(RuntimeError, match="can't be traced, exported or transformed"):
            model(fake)
    for transform in (lambda: make_fx(model)(x), lambda: torch.func.vmap(model)(x[None]),
                      lambda: torch.func.jvp(model, (x,), (x,)), lambda: model(TwoTensor(x, x))):  # fmt: skip
        with pytest.raises(RuntimeError, match="can't be traced, exported or transformed"):
            transform()


def test_what_only_watches_is_not(model):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 64, 64))
    assert counter.get_total_flops() > 10**6


def test_norms_that_take_the_batchs_statistics_are_refused():
    stage = make_stage("input", 3).eval()
    stage.execution = "sparse"
    stage[0].bn1.train()
    with pytest.raises(RuntimeError, match="a BatchNorm2d of this stage would take its statistics"):
        stage(images("input"))
    stage[0].bn1.eval()
    stage[0].bn1.running_mean = None
    with pytest.raises(RuntimeError, match="would take its statistics"):
        stage(images("input"))


def test_a_parameter_that_learns_behind_a_frozen_stem_is_told(model):
    stages = list(dg_timm.graph.stage.graph_stages(model).values())
    model.requires_grad_(False)
    stages[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match="sparse execution has no gradients"):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)  # a linear probe needs none of the stages' gradients
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.get_classifier().weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not model(torch.randn(2, 3, 64, 64)).requires_grad


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_an_image_that_is_not_a_number_stays_one(model, execution):
    """A weight that is not a number is not below a threshold: a corrupt image must not pass as a prediction."""
    dg_timm.set_execution(model, execution)
    x = torch.randn(3, 3, 64, 64)
    x[1] = float("nan")
    with torch.no_grad():
        out = model(x)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


def test_an_unknown_name_changes_nothing(model):
    for name in ("fast", "Sparse", None):
        with pytest.raises(ValueError, match="execution must be one of dense, sparse, static, got"):
            dg_timm.set_execution(model, name)
    assert all(stage.execution == "sparse" for stage in dg_timm.graph.stage.graph_stages(model).values())
    with pytest.raises(ValueError, match="is a static network"):
        dg_timm.set_execution(timm.create_model("resnet18"), "sparse")


def test_training_and_gradients(model):
    x = torch.randn(1, 3, 64, 64)
    model(x)  # parameters that want a gradient are no reason to refuse
    with pytest.raises(RuntimeError, match=r"sparse execution is for evaluation: call model.eval\(\)"):
        model.train()(x)
    with pytest.raises(RuntimeError, match="sparse execution has no gradients"):
        model.eval()(x).sum().backward()


def test_export_trace_script(model):
    x = torch.randn(1, 3, 64, 64)
    for attempt in (
        lambda: torch.jit.trace(model, x),
        lambda: torch.fx.symbolic_trace(model),
        lambda: torch.export.export(model, (x,)),
        lambda: torch.jit.script(model)(x),
    ):
        with pytest.raises(Exception, match="sparse execution"):
            attempt()


def test_compiled_it_falls_back_to_eager(model):
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        wanted = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), wanted)


def test_dense_is_the_default_and_is_not_saved(model, tmp_path):
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(stage.execution == "dense" for stage in dg_timm.graph.stage.graph_stages(again).values())
    assert isinstance(next(iter(dg_timm.graph.stage.graph_stages(again).values())), DGStage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge_scale", [True, False])
@pytest.mark.parametrize("topology", [graph.complete(4), [[], [0], [0], [1], [2], [0, 3, 4]]])
def test_edges_weighed_in_one_call_are_the_routers(dtype, edge_scale, topology, monkeypatch):
    router = Router(37, 0, topology, edge_scale, dtype=dtype)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn_like(parameter))
        router.threshold.fill_(0.5)
    maps = torch.randn(3, 37, 5, 5, dtype=dtype)

    def weighed():
        graph = sparse._ByKernels(aggregation.kernels_for(maps), maps, len(topology))
        graph.leave(0, maps, router)
        return graph.graph.alpha[:, 0, 1:]

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
    assert [sparse._parameters(stage.get_submodule(f"router{n}"), x.dtype) is None for n in range(3)] == [0, 1, 1]
    with torch.no_grad():
        wanted = stage(x)
        stage.execution = "sparse"
        torch.testing.assert_close(stage(x), wanted)
