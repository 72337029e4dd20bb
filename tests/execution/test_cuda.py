"""What runs on a GPU, against the same on the CPU or by the reference formulas. Skipped where there is none."""

import pytest
import timm
import torch
import torch.nn.functional as F

import dg_timm
from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.execution import backends, operators
from tests.helpers.networks import FAMILIES, close_at_random, randomize, randomize_graph, static_and_dynamic
from tests.helpers.scripts import run
from tests.helpers.stages import images, make_stage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

BACKENDS = ("reference", "kernels")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def exact():
    """Rounding of float32, and convolutions that sum in one order."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    matmul.allow_tf32 = before


def test_the_triton_kernels_are_what_runs():
    """The comparisons below would be empty otherwise."""
    x = torch.randn(2, 3, 4, 4, device="cuda")
    kernels = backends.kernels_for(x)
    assert type(kernels).__module__ == "dg_timm.execution.backends.triton_kernels"
    assert kernels.dtypes == set(TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 3, 16, 17, 37])
def test_kernels(n, dtype, layout):
    def draw():
        return torch.randn(3, 40, 17, 9, device="cuda").to(dtype).contiguous(memory_format=layout)

    maps, x = [draw() for _ in range(n)], draw()
    weights = torch.randn(3, n, device="cuda", dtype=torch.promote_types(dtype, torch.float32))
    weights[1, n // 2] = 0
    stacked = torch.stack(maps).double()
    maps[n // 2][1] = float("nan")  # its edge weighs 0: not read
    z = operators.weighted_sum(maps, weights)
    maps[n // 2][1] = stacked[n // 2, 1].to(dtype)
    dx, dw = operators.product_gradients(maps, x, weights)
    wanted = torch.einsum("bn,nbchw->bchw", weights.double(), stacked)
    dots = torch.einsum("nbchw,bchw->bn", stacked, x.double())
    assert z.dtype == dtype
    assert z.is_contiguous(memory_format=layout)
    for got, right in ((z, wanted), (dx, wanted), (dw, dots)):
        torch.testing.assert_close(got.double(), right, rtol=0, atol=TOLERANCE[dtype] * right.abs().max().item())


@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
@pytest.mark.parametrize("options", [{}, {"edge_scale": False, "block_shortcut": False}, {"instance_aware": False}])
def test_a_stage_and_its_gradients_are_those_of_the_cpu(kind, options):
    stage, x = make_stage(kind, 4, **options), images(kind)
    probe = torch.randn_like(stage(x))

    def run(device):
        stage.to(device)
        inputs = [x.to(device).requires_grad_(), *stage.parameters()]
        out = stage(inputs[0])
        return [out, *torch.autograd.grad((out * probe.to(device)).sum(), inputs, allow_unused=True)]

    for wanted, got in zip(run("cpu"), run("cuda"), strict=True):
        assert (wanted is None) == (got is None)
        if wanted is not None:
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversion_predicts_what_the_static_network_does(name, layout):
    static, dynamic = (m.eval().cuda().to(memory_format=layout) for m in static_and_dynamic(name))
    x = torch.randn(4, 3, 96, 96, device="cuda").contiguous(memory_format=layout)
    with torch.no_grad():
        assert torch.equal(dynamic(x), static(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_kernels_are_no_worse_than_the_formulas(dtype):
    model = randomize_graph(timm.create_model("dg_cifar_resnet20")).cuda().train()
    model.to(memory_format=torch.channels_last)
    x = torch.randn(32, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (32,), device="cuda")

    def gradients(backend, to):
        with operators.using_backend(backend):
            with torch.autocast("cuda", to, enabled=to != torch.float32):
                loss = F.cross_entropy(model(x).float(), labels)
            return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    def distance(some, others):
        return sum(float((a - b).square().sum()) for a, b in zip(some, others, strict=True) if a is not None) ** 0.5

    right, formulas, kernels = gradients("reference", torch.float32), *(gradients(b, dtype) for b in BACKENDS)
    assert all(g.isfinite().all() for g in kernels if g is not None)
    assert distance(kernels, right) <= 1.2 * distance(formulas, right)


def test_no_step_of_training_waits_for_the_device():
    """What would is told by torch; a loop that waits can't prepare the next kernels."""
    model = randomize_graph(randomize(timm.create_model("dg_cifar_resnet20", gates=True))).cuda().train()
    expected = ExpectedCost(model)
    x = torch.randn(8, 3, 32, 32, device="cuda")

    def step():
        with expected.recording(8, noise=1.0) as costs:
            loss = model(x).square().mean()
        (loss + costs()[0].mean()).backward()

    step()  # kernels are compiled and checked
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("openness", [0.0, 0.4, 0.8])
def test_sparse_execution_is_dense_execution(openness):
    for name in ("dg_resnet18", "dg_mobilenetv2_050"):
        _, model = static_and_dynamic(name)
        randomize_graph(model).cuda().eval()
        close_at_random(model, openness)
        x = torch.randn(6, 3, 64, 64, device="cuda")
        with torch.no_grad():
            wanted = model(x)
            dg_timm.set_execution(model, "sparse")
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


def test_learning_a_cost_is_that_of_the_cpu():
    model = randomize_graph(randomize(timm.create_model("dg_cifar_resnet20", gates=True))).double().train()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        with ExpectedCost(model).recording(4, noise=1.0, seed=3) as costs:
            loss = model(x.to(device)).square().mean()
        cost, _ = costs()
        grads = torch.autograd.grad(loss + cost.mean(), list(model.parameters()), allow_unused=True)
        found.append([cost.cpu(), *[g.cpu() for g in grads if g is not None]])
    assert len(found[0]) == len(found[1]) > 20
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # margins are float32


def test_a_cuda_graph_replays_it():
    _, model = static_and_dynamic("dg_resnet18")
    randomize_graph(model).cuda().eval()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            out = model(x)
        x.copy_(torch.randn_like(x))
        recorded.replay()
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


def test_compiled():
    _, model = static_and_dynamic("dg_resnet18")
    randomize_graph(model).cuda().eval()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_with_a_target(precision, tmp_path):
    command = ["--data", "digits", "--model", "dg_cifar_resnet20",
               "--image-size", "32", "--epochs", "2", "--batch-size", "64", "--opt", "adamw", "--lr", "2e-3",
               "--target-cost", "0.6", "--mixed-precision", precision, "--channels-last", "--workers", "1",
               "--output", tmp_path / "run"]  # fmt: skip
    done = run("train.py", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    config = (tmp_path / "run" / "summary.csv").read_text(encoding="utf-8")
    assert config.count("\n") >= 3
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
