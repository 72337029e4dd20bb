"""Every way to aggregate against the reference formulas, in value and gradient; memory; missing compilers."""

import gc
import os
import subprocess
import sys
import warnings

import pytest
import timm
import torch

import dg_timm
from dg_timm.execution import aggregation
from dg_timm.execution import allocator as map_memory
from dg_timm.execution.backends import cpu as cpu_kernels
from dg_timm.graph import edges as graph
from dg_timm.graph import stage
from tests.helpers.networks import randomize, randomize_graph, static_and_dynamic
from tests.helpers.stages import images, make_stage

LAYOUTS = [torch.contiguous_format, torch.channels_last]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(params=["kernels", "torch"])
def path(request):
    with aggregation.path(request.param):
        yield request.param


def make_maps(n, dtype, layout=torch.contiguous_format, shape=(3, 5, 7, 9)):
    return [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(n)]


def test_the_kernels_are_what_runs_here():
    """The comparisons below would be empty otherwise."""
    kernels = cpu_kernels.load()
    assert kernels is not None
    assert kernels.dtypes == set(cpu_kernels.SUFFIXES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 4, 5, 37])
def test_gather(path, n, dtype, layout):
    sources, weights = make_maps(n, dtype, layout), torch.randn(3, n)
    weights[1, n // 2] = 0
    wanted = torch.einsum("bn,nbchw->bchw", weights.double(), torch.stack(sources).double())
    z = aggregation.gather(sources, weights)
    assert z.dtype == dtype
    assert z.is_contiguous(memory_format=layout)
    scale = 5 if path == "torch" else 1  # rounds after every source
    tolerance = scale * TOLERANCE[dtype] * wanted.abs().max().item()
    torch.testing.assert_close(z.double(), wanted, rtol=0, atol=max(tolerance, 2e-7 if dtype == torch.float64 else 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 3, 4, 5, 37])
def test_fan_out_gradients(path, n, dtype, layout):
    gradients, x, weights = make_maps(n, dtype, layout), make_maps(1, dtype, layout)[0], torch.randn(3, n).double()
    stacked = torch.stack(gradients).double()
    dx, dw = aggregation.fan_out_gradients(gradients, x, weights)
    wanted_dx = torch.einsum("bn,nbchw->bchw", weights, stacked)
    wanted_dw = torch.einsum("nbchw,bchw->bn", stacked, x.double())
    atol = 5 * TOLERANCE[dtype]
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=0, atol=atol * wanted_dx.abs().max().item())
    torch.testing.assert_close(dw.double(), wanted_dw, rtol=0, atol=atol * wanted_dw.abs().max().item())
    assert aggregation.fan_out_gradients(gradients, x, weights, need_dx=False)[0] is None
    assert aggregation.fan_out_gradients(gradients, x, weights, need_dw=False)[1] is None
    assert torch.equal(aggregation.fan_out_gradients(gradients, x, weights, need_dw=False)[0], dx)
    assert torch.equal(aggregation.fan_out_gradients(gradients, x, weights, need_dx=False)[1], dw)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [3, 300])
def test_pool(dtype, layout, channels):
    x = torch.randn(2, channels, 5, 7).to(dtype).contiguous(memory_format=layout)
    wanted = x.double().mean((2, 3))
    torch.testing.assert_close(aggregation.pooled(x).double(), wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch rounds otherwise on other processors")
def test_float32_is_the_reference_to_the_bit():
    """What is traced, scripted or exported then predicts what eager mode does."""
    for n in (1, 2, 5, 9):
        sources, weights = make_maps(n, torch.float32, shape=(2, 8, 33, 33)), torch.rand(2, n)
        assert torch.equal(aggregation.gather(sources, weights), graph.aggregate(sources, weights))


def test_results_do_not_depend_on_the_number_of_threads():
    sources, weights = make_maps(6, torch.float32, shape=(3, 64, 31, 31)), torch.randn(3, 6)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                (aggregation.gather(sources, weights), *aggregation.fan_out_gradients(sources, sources[0], weights))
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_maps_of_other_layouts_types_and_views_are_taken(path):
    a, b = make_maps(2, torch.float32)
    odd = b.double().transpose(2, 3).contiguous().transpose(2, 3)
    weights = torch.tensor([[0.5, 2.0]]).expand(3, 2)
    torch.testing.assert_close(aggregation.gather([a, odd], weights), 0.5 * a + 2 * b)
    expanded = a[:, :, :1, :1].expand(a.shape)
    dx, dw = aggregation.fan_out_gradients([expanded], b.contiguous(memory_format=torch.channels_last), weights[:, :1])
    torch.testing.assert_close(dx, 0.5 * expanded.contiguous())
    torch.testing.assert_close(dw[:, 0], (expanded * b).sum((1, 2, 3)))


def test_an_empty_batch(path):
    empty = [torch.empty(0, 3, 4, 4)] * 2
    assert aggregation.gather(empty, torch.empty(0, 2)).shape == (0, 3, 4, 4)


def test_what_does_not_fit_is_refused_before_memory_is_touched(path):
    a, b = make_maps(2, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        aggregation.gather([a, b], torch.rand(4, 2))
    with pytest.raises(ValueError, match="do not fit"):
        aggregation.gather([a, b[:, :, :3]], torch.rand(3, 2))
    with pytest.raises(ValueError, match="do not fit"):
        aggregation.fan_out_gradients([a], b[:2], torch.rand(3, 1))
    with pytest.raises(ValueError, match="path must be one of"), aggregation.path("fast"):
        pass


# --------------------------------------------------------------------------- in a stage


def gradients(made, x, **options):
    wanted = [x, *made.parameters()]
    return torch.autograd.grad(made(x).square().sum(), wanted, allow_unused=True, **options)


def check_gradients(made, x, learning):
    found = torch.autograd.grad(made(x).square().sum(), learning)
    with aggregation.path("reference"):
        wanted = torch.autograd.grad(made(x).square().sum(), learning)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_double_backward_is_right(path, kind):
    made, x = make_stage(kind, 3), images(kind, batch=2).requires_grad_()

    def second():
        first = gradients(made, x, create_graph=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        return torch.autograd.grad(penalty, [x, *made.parameters()], allow_unused=True)

    found = second()
    with aggregation.path("reference"):
        wanted = second()
    assert sum(g is not None for g in found) > 10
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-8, atol=1e-8)


def test_backward_twice_and_in_part(path):
    made, x = make_stage("shortcut", 4), images("shortcut").requires_grad_()
    with aggregation.path("reference"):
        wanted = gradients(made, x)
    loss = made(x).square().sum()
    (only,) = torch.autograd.grad(loss, [made.router2.fc.weight], retain_graph=True)
    names = [name for name, _ in made.named_parameters()]
    torch.testing.assert_close(only, wanted[1 + names.index("router2.fc.weight")], rtol=1e-9, atol=1e-9)
    for keep in (True, False):
        again = torch.autograd.grad(loss, [x, *made.parameters()], allow_unused=True, retain_graph=keep)
        for f, w in zip(again, wanted, strict=True):
            torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", ["blocks", "graph"])
def test_frozen_parts(path, frozen):
    made, x = make_stage("projection", 3), images("projection")
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.startswith(("router", "projection")) == (frozen == "blocks"))
    check_gradients(made, x, [p for p in made.parameters() if p.requires_grad])


def test_forward_mode_and_batched_derivatives_are_right():
    made, x = make_stage("shortcut", 3), images("shortcut", batch=2).requires_grad_()
    out = made(x)
    tangent, cotangents = torch.randn_like(x), torch.randn(2, *out.shape, dtype=x.dtype)
    (batched,) = torch.autograd.grad(out, x, cotangents, is_grads_batched=True, retain_graph=True)
    for got, cotangent in zip(batched, cotangents, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(out, x, cotangent, retain_graph=True)[0])
    with torch.autograd.forward_ad.dual_level():
        dual = made(torch.autograd.forward_ad.make_dual(x.detach(), tangent))
        along = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close((along * cotangents[0]).sum(), (batched[0] * tangent).sum())
    torch.testing.assert_close(torch.func.jvp(made, (x.detach(),), (tangent,))[1], along)


def test_blocks_that_change_their_input_in_place_get_right_gradients():
    made, x = make_stage("input", 3), images("input")
    for name in made.block_names:
        block = made.get_submodule(name)
        block.conv1 = torch.nn.Sequential(torch.nn.ReLU(inplace=True), block.conv1)
    learning = [made.get_submodule(name).conv1[1].weight for name in made.block_names]
    check_gradients(made, x, learning)


def test_changing_the_input_of_a_frozen_graph_before_backward_is_an_error():
    made, x = make_stage("input", 3), images("input")
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not name.startswith("router"))
    loss = made(x).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_a_feature_in_place_before_backward_is_an_error():
    made, x = make_stage("input", 3), images("input").requires_grad_()
    features = []
    made.get_submodule("1").register_forward_hook(lambda module, args, out: features.append(out))
    loss = made(x).sum()
    with torch.no_grad():
        features[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_inputs_of_blocks_are_not_kept(monkeypatch):
    """A node's input is gathered again in the backward pass: as often as there are blocks, and not kept before."""
    made, x = make_stage("input", 5, dtype=torch.float32), images("input", dtype=torch.float32)
    gathered, alive = [], []

    def count(sources, weights):
        z = original(sources, weights)
        gathered.append(z.shape)
        alive.append(z.untyped_storage()._weak_ref())
        return z

    original = aggregation.gather
    monkeypatch.setattr(aggregation, "gather", count)
    out = made(x)
    forward = len(gathered)
    gc.collect()
    kept = sum(not torch.UntypedStorage._expired(ref) for ref in alive)
    assert forward == 6  # five blocks and the output
    assert kept == 1  # the output alone
    out.sum().backward()
    assert len(gathered) == forward + 5


def test_hooks_on_saved_tensors_have_their_way():
    made, x = make_stage("input", 3), images("input")
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        out = made(x)
    assert packed.count(x.shape) > 5
    out.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dg_resnet18", "dg_mobilenetv2_050", "dg_regnety_002"])
def test_networks_train_as_by_the_reference(name, layout):
    model = (
        randomize_graph(timm.create_model(name, num_classes=5), spread=0.5).double().to(memory_format=layout).train()
    )
    x, start = torch.randn(4, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=layout), model.state_dict()
    start = {key: value.clone() for key, value in start.items()}
    found = {}
    for way in ("kernels", "torch", "reference"):
        model.load_state_dict(start)
        model.zero_grad()
        with aggregation.path(way):
            model(x).square().mean().backward()
        found[way] = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    for way in ("kernels", "torch"):
        for key, wanted in found["reference"].items():
            torch.testing.assert_close(found[way][key], wanted, rtol=1e-6, atol=1e-9, msg=f"{way} {key}")


# --------------------------------------------------------------------------- inference in parts


def count_parts(model):
    """How many times block 1 of the first stage runs in one forward, without a hook that would forbid parts."""
    block = next(iter(dg_timm.graph.stage.graph_stages(model).values()))[0]
    calls, forward = [], block.forward

    def counted(*args):
        calls.append(len(args[0]))
        return forward(*args)

    block.forward = counted
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dg_resnet18", "dg_mobilenetv2_050", "dg_regnetx_002"])
def test_parts_of_a_batch_predict_what_the_batch_does_to_the_bit(name, layout, monkeypatch):
    monkeypatch.setattr(stage, "LIVE_BYTES", 2**16)
    static, model = static_and_dynamic(name)
    static, model = static.to(memory_format=layout), model.to(memory_format=layout)
    x = torch.randn(7, 3, 64, 64).contiguous(memory_format=layout)
    calls = count_parts(model)
    with torch.no_grad():
        assert torch.equal(model(x), static(x))
        assert len(calls) > 1
        assert sum(calls) == 7
        assert min(calls) >= 1
        randomize_graph(model)
        with aggregation.path("reference"):
            wanted = model(x)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


def test_who_watches_a_stage_sees_the_whole_batch(monkeypatch):
    monkeypatch.setattr(stage, "LIVE_BYTES", 2**16)
    model = timm.create_model("dg_resnet18").eval()
    x, seen = torch.randn(8, 3, 64, 64), []
    calls = count_parts(model)
    with torch.no_grad():
        model(x)
        assert len(calls) > 1
        handle = model.layer2[1].register_forward_hook(lambda module, args, out: seen.append(len(out)))
        model(x)
        handle.remove()
        assert seen == [8]
        assert dg_timm.adjacency(model, x)["layer1"].shape[0] == 8
        calls.clear()
        model.layer1[0].bn1.train()(torch.randn(2, 64, 4, 4))
        model(x)  # statistics of the batch
        assert calls == [8]
        bn = model.eval().layer1[0].bn1
        kept, bn.running_mean = bn.running_mean, None
        calls.clear()
        assert next(iter(dg_timm.graph.stage.graph_stages(model).values())).pieces(x.expand(8, -1, -1, -1)) == 1
        bn.running_mean = kept
    calls.clear()
    model.eval()(x)  # with gradients
    assert calls == [8]


# --------------------------------------------------------------------------- memory of maps


def test_blocks_come_back_and_are_never_shared():
    like = torch.empty(4, 64, 80, 80)
    first = map_memory.empty_like(like).fill_(1)
    second = map_memory.empty_like(like).fill_(2)
    view, address = first[1], first.data_ptr()
    del first
    third = map_memory.empty_like(like).fill_(3)
    assert (view == 1).all()  # a view holds its block
    assert (second == 2).all()
    assert third.data_ptr() != address
    del view
    gc.collect()
    assert map_memory.empty_like(like).data_ptr() == address
    assert map_memory.empty_like(like.contiguous(memory_format=torch.channels_last)).stride() == (409600, 1, 5120, 64)
    assert map_memory.empty_like(like, 2).shape == (2, 64, 80, 80)


def test_blocks_may_come_back_while_one_is_taken():
    """The garbage collector frees maps at any moment, also in the midst of taking a block."""
    before = gc.get_threshold()
    try:
        for round in range(300):
            gc.set_threshold(2 + round % 40)
            cycle = [map_memory.empty_like(torch.empty(1, 2**21))]
            cycle.append(cycle)
            del cycle
    finally:
        gc.set_threshold(*before)


def test_idle_memory_is_bounded(monkeypatch):
    map_memory._idle.clear()
    monkeypatch.setattr(map_memory, "MOST_IDLE", 2**24)
    held = [map_memory.empty_like(torch.empty(1, 2**21)) for _ in range(6)]
    del held
    gc.collect()
    assert 0 < sum(map(len, map_memory._idle)) <= 2**24


# --------------------------------------------------------------------------- without compiler, and in Triton


PROGRAM = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dg_timm
    from dg_timm.execution import aggregation
    from dg_timm.graph import edges as graph
    imported = [str(w.message) for w in caught if "aggregation" in str(w.message)]
    maps, weights = [torch.randn(2, 3, 4, 4) for _ in range(3)], torch.rand(2, 3)
    for _ in range(3):
        torch.testing.assert_close(aggregation.gather(maps, weights), graph.aggregate(maps, weights))
    said = [str(w.message) for w in caught if "aggregation" in str(w.message)]
print(len(imported), len(said), *said)
"""


def run_program(tmp_path, **variables):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **variables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_compiler_makes_one_library(tmp_path):
    assert run_program(tmp_path).strip() == "0 0"
    libraries = list((tmp_path / "cache" / "dg_timm").iterdir())
    assert [path.suffix for path in libraries] == [".so"]
    stamp = libraries[0].stat().st_mtime_ns
    assert run_program(tmp_path).strip() == "0 0"
    assert libraries[0].stat().st_mtime_ns == stamp
    libraries[0].write_bytes(b"damaged")
    assert run_program(tmp_path).strip() == "0 0"
    assert len(libraries[0].read_bytes()) > 1000


def test_without_a_compiler_it_falls_back_and_says_so_once(tmp_path):
    (tmp_path / "bin").mkdir()
    for variables in (dict(PATH=str(tmp_path / "bin")), dict(CC="no-such-compiler"), dict(CC="false")):
        said = run_program(tmp_path, **variables)
        assert said.startswith("0 1 aggregation runs on PyTorch's own operations"), (variables, said)
        assert "DG_TIMM_KERNELS=0 silences this" in said
    assert run_program(tmp_path, CC="no-such-compiler", DG_TIMM_KERNELS="0").strip() == "0 0"


def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path):
    folder = tmp_path / "cache" / "dg_timm"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert run_program(tmp_path).strip() == "0 0"
    assert list(folder.iterdir()) == []


TRITON = """
import warnings
import torch
from dg_timm.execution.backends import cuda as cuda_kernels
kernels = cuda_kernels.Kernels()
for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
    for n in (1, 3, 16, 17, 35):
        maps = [torch.randn(3, 5, 7, 9).to(dtype) for _ in range(n)]
        x, weights = torch.randn(3, 5, 7, 9).to(dtype), torch.randn(3, n).to(torch.promote_types(dtype, torch.float32))
        weights[1, n // 2] = 0
        maps[n // 2][1] = float("nan")  # of weight 0: not read
        clean = torch.stack(maps).double().nan_to_num()
        wanted = torch.einsum("bn,nbchw->bchw", weights.double(), clean)
        z, dx, dw = torch.empty_like(x), torch.empty_like(x), torch.empty_like(weights)
        kernels.gather(z, maps, weights)
        maps[n // 2][1] = 0
        kernels.fan_out(dx, dw, maps, x, weights)
        dots = torch.einsum("nbchw,bchw->bn", clean, x.double())
        for got, right in ((z, wanted), (dx, wanted), (dw, dots)):
            assert (got.double() - right).abs().max() <= tolerance * right.abs().max() + 1e-12, (dtype, n)
from dg_timm.execution import aggregation
here = torch.device("cpu")  # where the interpreter runs
assert isinstance(aggregation._cuda_kernels(here), cuda_kernels.Kernels)
cuda_kernels.Kernels.gather = lambda self, out, sources, weights: out.zero_()
aggregation._cuda_kernels.cache_clear()
with warnings.catch_warnings(record=True) as caught:
    assert aggregation._cuda_kernels(here) is None
    assert aggregation._cuda_kernels(here) is None
assert len(caught) == 1 and "they give wrong sums on cpu" in str(caught[0].message)
print("right")
"""


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")
    done = subprocess.run(
        [sys.executable, "-c", TRITON], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "right", done.stderr[-2000:]


def test_compiled_networks_take_the_reference_formulas():
    """They are fused by the compiler; nothing of eager mode is called."""
    model = randomize(randomize_graph(timm.create_model("dg_regnetx_002", num_classes=3)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        explained = torch._dynamo.explain(model)(x)
        assert explained.graph_count == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_large_maps_on_the_cpu_whatever_the_default_device_is():
    maps = [torch.randn(4, 64, 72, 72) for _ in range(2)]  # 5 MiB: memory of our own
    wanted = graph.aggregate(maps, torch.ones(4, 2))
    weights = torch.ones(4, 2)
    with torch.device("meta"):
        got = aggregation.gather(maps, weights)
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, wanted)


def test_training_where_saved_tensors_may_have_no_hooks():
    stage, x = make_stage("input", 3), images("input")
    out = stage(x)
    wanted = torch.autograd.grad(out.sum(), list(stage.parameters()))
    with torch.autograd.graph.disable_saved_tensors_hooks("none, please"):
        got = torch.autograd.grad(stage(x).sum(), list(stage.parameters()))
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
