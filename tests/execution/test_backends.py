"""Every way to run a graph against the reference formulas: values and gradients, and what lies behind closed edges.

The features of one block are inf for one image and NaN for another, and every edge that leaves it is closed. No backend
may read them; and all must read them where an edge is open.
"""

import warnings

import pytest
import torch
from torch import nn

from dg_timm._errors import UserError
from dg_timm.execution import operators
from dg_timm.graph import edges
from dg_timm.graph.context import GateSampling, requesting
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import DGStage
from tests.helpers.maps import make_maps
from tests.helpers.scripts import python
from tests.helpers.stages import images, make_stage


def by_formulas(stage, x):
    with operators.using_backend("reference"):
        return stage(x)


def by_torch(stage, x):
    with operators.using_backend("torch"):
        return stage(x)


def by_kernels(stage, x):
    with operators.using_backend("kernels"):
        return stage(x)


def by_script(stage, x):
    return torch.jit.script(stage)(x)


def by_trace(stage, x):
    return torch.jit.trace(stage, x.clone())(x)


def by_export(stage, x):
    return torch.export.export(stage, (x.clone(),)).module()(x)


def by_aot(stage, x):
    return torch.compile(stage, backend="aot_eager", fullgraph=True)(x)


def by_inductor(stage, x):
    return torch.compile(stage, fullgraph=True)(x)


def by_checkpoints(stage, x):
    stage.grad_checkpointing = True
    return stage(x)


def in_fixed_execution(stage, x):
    stage.execution = "fixed"
    return stage(x)


def while_a_cost_is_learned(stage, x):
    with requesting(gates=GateSampling()):
        return stage(x)


def in_sparse_execution(run):
    def sparse(stage, x):
        stage.execution = "sparse"
        with torch.no_grad():
            return run(stage, x)

    return sparse


TRAIN = {"kernels": by_kernels, "torch": by_torch, "checkpointed": by_checkpoints, "scripted": by_script,
         "fixed": in_fixed_execution}  # fmt: skip
PREDICT = {**TRAIN, "traced": by_trace, "exported": by_export, "learning a cost": while_a_cost_is_learned,
           "sparse by kernels": in_sparse_execution(by_kernels),
           "sparse by torch": in_sparse_execution(by_torch)}  # fmt: skip
KINDS = ("input", "shortcut", "projection")
GATED = tuple(f"gated-{kind}" for kind in KINDS)


def ways(found, kinds=KINDS + GATED):
    """Every kind of stage in every way; compilers take long, so of theirs a few."""
    made = []
    for kind in kinds:
        made += [pytest.param(kind, run, id=f"{name}-{kind}") for name, run in found.items()]
        slow = () if kind == "shortcut" else (pytest.mark.slow,)
        made += [pytest.param(kind, by_aot, id=f"aot-{kind}", marks=slow),
                 pytest.param(kind, by_inductor, id=f"inductor-{kind}", marks=pytest.mark.slow)]  # fmt: skip
    return pytest.mark.parametrize(("kind", "run"), made)


class Poisoned(nn.Module):
    """A block whose feature is inf for the first image and NaN for the second."""

    def __init__(self, block: nn.Module, *bad: float) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("bad", torch.tensor(bad, dtype=torch.float64).view(-1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.bad == 0, self.block(x), self.bad)


def random_stage(kind, seed, **options) -> DGStage:
    torch.manual_seed(seed)
    stage = make_stage(kind.removeprefix("gated-"), 4, gates=kind in GATED, **options)
    with torch.no_grad():
        for gate in gates(stage).values():  # half of the images skip
            nn.init.normal_(gate.fc.weight, std=5.0)
            nn.init.normal_(gate.fc.bias, std=0.1)
        for node in range(5):  # some closed at any weight, and the input's never: images always reach something
            stage.get_submodule(f"router{node}").threshold.fill_(0.0 if node == 0 else 0.3)
    return stage


def poisoned_stage(kind, closed=True) -> DGStage:
    """Weights are those of all images, so that they are known: a router of what is no number gives none."""
    stage = random_stage(kind, 0, instance_aware=False)
    with torch.no_grad():
        stage.router0.scale.clamp_(min=1.0)
        stage.router2.threshold.fill_(0.3)
        stage.router2.scale.fill_(0.0 if closed else 2.0)
        for gate in list(gates(stage).values())[:2]:  # all images reach the bad block
            gate.reset_parameters()
    stage[1] = Poisoned(stage[1], float("inf"), float("nan"), 0.0)
    return stage.eval()


def run_quietly(run, stage, x):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        return run(stage, x)


@ways(PREDICT)
def test_values_are_those_of_the_formulas(kind, run):
    for seed in (0, 1) if run not in (by_aot, by_inductor) else (0,):
        stage, x = random_stage(kind, seed), images(kind.removeprefix("gated-"), 5)
        with torch.no_grad():
            wanted = by_formulas(stage, x)
            assert (wanted != 0).any()
            torch.testing.assert_close(run_quietly(run, stage, x), wanted, rtol=1e-9, atol=1e-9)


@ways(PREDICT)
def test_a_closed_edge_is_not_read(kind, run):
    stage, x = poisoned_stage(kind), images(kind.removeprefix("gated-"))
    with torch.no_grad():
        wanted = by_formulas(stage, x)
        assert wanted.isfinite().all()
        assert (wanted != 0).any()
        stage[1].bad.zero_()
        torch.testing.assert_close(wanted, by_formulas(stage, x))  # as if the feature were a number
        stage[1].bad.copy_(torch.tensor([float("inf"), float("nan"), 0.0]).view(-1, 1, 1, 1))
        torch.testing.assert_close(run_quietly(run, stage, x), wanted, rtol=1e-9, atol=1e-9)


@ways(PREDICT, kinds=("shortcut",))
def test_an_open_edge_is_read(kind, run):
    """The test above would be empty otherwise."""
    stage, x = poisoned_stage(kind, closed=False), images(kind.removeprefix("gated-"))
    with torch.no_grad():
        out = run_quietly(run, stage, x)
    assert [bool(image.isfinite().all()) for image in out] == [False, False, True]


def gradients(run, stage, x):
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    out = run_quietly(run, stage, x)
    wanted = {"x": x, **dict(stage.named_parameters())}
    found = torch.autograd.grad((out * torch.randn_like(out)).sum(), list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def assert_same_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    assert sum(bool(g.any()) for g in wanted.values() if g is not None) > 10
    for name, right in wanted.items():
        got = found[name]
        if got is None or right is None:  # a graph may be known to give no gradient, or give one of zeros
            assert not any(bool(g.any()) for g in (got, right) if g is not None), name
        else:
            torch.testing.assert_close(got, right, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@ways(TRAIN)
def test_gradients_are_those_of_the_formulas(kind, run):
    stage, x = random_stage(kind, 0), images(kind.removeprefix("gated-"), 5)
    wanted = gradients(by_formulas, stage, x)
    assert_same_gradients(gradients(run, stage, x), wanted)


@ways(TRAIN)
def test_gradients_do_not_see_what_is_behind_a_closed_edge(kind, run):
    stage, x = poisoned_stage(kind), images(kind.removeprefix("gated-"))
    wanted = gradients(by_formulas, stage, x)
    assert all(g.isfinite().all() for g in wanted.values() if g is not None)
    assert_same_gradients(gradients(run, stage, x), wanted)


# --------------------------------------------------------------------------- the weighted sum alone


BAD = {"inf": float("inf"), "-inf": -float("inf"), "nan": float("nan")}


def poisoned_maps(n=5, dtype=torch.float32):
    """Maps, weights with zeros, and the same maps with no numbers behind the zeros."""
    maps, weights = make_maps(n, dtype, shape=(3, 4, 5, 6)), torch.rand(3, n) + 0.5
    weights[0, 1] = weights[1, 0] = weights[2, n - 1] = 0
    bad = [m.clone() for m in maps]
    bad[1][0], bad[0][1], bad[n - 1][2] = BAD.values()
    return maps, weights, bad


def sum_by_torch(maps, weights):
    with operators.using_backend("torch"):
        return operators.weighted_sum(maps, weights)


SUMS = {
    "formulas": edges.weighted_sum,
    "kernels": operators.weighted_sum,
    "torch": sum_by_torch,
    "operator": torch.ops.dg_timm.weighted_sum,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_the_weighted_sum_does_not_read_what_weighs_nothing(name, learns, dtype):
    maps, weights, bad = poisoned_maps(dtype=dtype)
    with torch.set_grad_enabled(learns):
        wanted, got = SUMS[name](maps, weights), SUMS[name](bad, weights)
    assert torch.equal(got, wanted)
    torch.testing.assert_close(got, edges.weighted_sum(maps, weights), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("backend", ["kernels", "torch"])
def test_gradients_of_products_do_not_read_what_weighs_nothing(backend, needs):
    """A gradient that is no number leaves no trace behind a closed edge."""
    gradients, weights, bad = poisoned_maps()
    (x,) = make_maps(1, shape=(3, 4, 5, 6))
    with operators.using_backend(backend):
        (dx, _), (got, _) = (operators.product_gradients(g, x, weights, *needs) for g in (gradients, bad))
    if needs[0]:
        torch.testing.assert_close(got, dx)


TRITON = """
import sys, torch
from dg_timm.execution.backends import triton_kernels
saved = torch.load(sys.argv[1])
kernels, found = triton_kernels.TritonKernels(), []
for maps, weights in saved:
    out = torch.empty_like(maps[0])
    kernels.weighted_sum(out, maps, weights)
    found.append(out)
torch.save(found, sys.argv[1])
"""


def test_triton_in_the_interpreter_is_the_reference(tmp_path):
    pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")
    made = {n: poisoned_maps(n) for n in (2, 5, 16, 17, 35)}
    torch.save([(bad, weights) for _, weights, bad in made.values()], tmp_path / "maps.pt")
    done = python("-c", TRITON, tmp_path / "maps.pt", env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for (maps, weights, _), got in zip(made.values(), torch.load(tmp_path / "maps.pt"), strict=True):
        torch.testing.assert_close(got, edges.weighted_sum(maps, weights), rtol=1e-5, atol=1e-5)


def test_there_is_no_other_backend():
    """Who adds one adds it to the tests above."""
    assert operators.BACKENDS == ("kernels", "torch", "reference")
    with pytest.raises(UserError):
        operators.using_backend("fast").__enter__()
