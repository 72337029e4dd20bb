"""Choose how a stage runs: the one place where settings, the request of a call, and what is possible meet."""

from functools import partial

import torch
from torch import Tensor

from dg_timm.execution import autograd, chunking, operators, sparse
from dg_timm.execution.dense import Checkpointed, Dense, unused_parameters
from dg_timm.graph.context import Request, by_image, request
from dg_timm.graph.stage import DGStage


def run_stage(stage: DGStage, x: Tensor) -> Tensor:
    """Run a stage: (batch, in_chs, H, W) -> (batch, out_chs, H', W').

    In dense and fixed execution there is no control flow that depends on values. A request of the call
    (:mod:`dg_timm.graph.context`) comes before the stage's own settings.
    """
    asked = request()
    execution = asked.execution or stage.execution
    if execution == "sparse" and asked.passes is not None:
        return asked.passes.run_stage(stage, x, partial(_run_sparse, stage))
    if execution == "sparse":
        return _run_sparse(stage, x)
    topology = stage.topology if execution == "fixed" else stage.edges
    plain = operators.is_plain(x)

    def run_by(stage: DGStage, x: Tensor) -> Tensor:
        return stage.run(_executor(stage, topology, plain, asked), x)

    run = partial(run_by, stage)

    watched = asked.recorder is not None or asked.gates is not None
    chunks = chunking.num_chunks(stage, x) if plain and not watched else 1
    if chunks > 1:
        with by_image():
            return chunking.run_chunks(run, x, chunks if chunking.may_run(stage, run_by, x, chunks) else 1)
    out = run(x)
    if plain and out.requires_grad and (execution == "fixed" or _has_fixed_threshold(stage, asked) or _is_open(stage)):
        unused = unused_parameters(stage, topology, asked.threshold is not None)
        out = autograd.TakePart.apply(out, *unused) if unused else out
    return out


def _executor(stage: DGStage, topology: list[list[int]], plain: bool, asked: Request) -> Dense:
    kind = Checkpointed if stage.grad_checkpointing and torch.is_grad_enabled() else Dense
    return kind(stage, topology, plain, asked.recorder, asked.gates)


def _has_fixed_threshold(stage: DGStage, asked: Request) -> bool:
    return asked.threshold is not None or stage.router0.fixed_threshold is not None  # type: ignore[union-attr]


def _is_open(stage: DGStage) -> bool:
    """Whether a budget opens every gate, so that gates learn nothing."""
    return any(getattr(stage, f"gate{node}").effective_budget() is None for node in stage.gated_nodes[:1])


@torch.compiler.disable(reason="sparse execution chooses what to run by the image")
def _run_sparse(stage: DGStage, x: Tensor) -> Tensor:
    sparse.refuse_recording(x)
    sparse.refuse_training(stage)
    if x.is_meta:  # only shapes are asked for
        return stage.run(Dense(stage, stage.edges, plain=False), x)
    with torch.no_grad():
        out = chunking.run_chunks(lambda part: sparse.run_sparse(stage, part), x, chunking.num_chunks(stage, x))
    return sparse.without_gradient(stage, x, out)
