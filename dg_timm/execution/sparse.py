"""Sparse execution: a closed edge is not read, and a removed node is not run, image by image (paper 3.4).

The result is that of dense execution, to rounding. Only images that use a node pass through its block, as a smaller
batch; nothing is padded to the densest image. Evaluation only: which edges are open is read back from the routers, so
there is nothing to differentiate, trace or export.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from dg_timm import _compat
from dg_timm._errors import BadState
from dg_timm.execution import operators
from dg_timm.execution.sparse_states import State, start_state
from dg_timm.graph.context import request
from dg_timm.graph.executor import Executor, FirstEdge
from dg_timm.graph.router import Router
from dg_timm.graph.stage import DGStage

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NEEDS_DENSE = "dg_timm.set_execution(model, 'dense')"


class Sparse(Executor):
    """Runs one batch through a stage, each block for the images that need it."""

    def __init__(self, stage: DGStage) -> None:
        refuse_shards(stage)
        self.stage, self.own = stage, _compat.own_modules(stage)
        self.nodes = len(stage.edges)
        self.state: State | None = None
        self.decided = 0  # the last node whose gate was asked
        self.passes = request().passes
        self.skipped: set[int] = set()  # images that skip a block, while somebody asks

    def read(self, node: int, source: Tensor | None = None) -> Tensor | None:
        """As in :class:`Executor`; None if no image has an open edge into the node, and its gate open."""
        assert self.state is not None
        if node == self.nodes - 1:
            self.state.select_all()
        elif not self.state.select(node):
            return None
        elif node in self.stage.gated_nodes and self.decided < node:
            self.decided = node  # block 1 may read twice
            if not self.close_gates(node):
                return None
        return self.state.gather(node, None if source is None else operators.match_layout([source], source)[0])

    def close_gates(self, node: int) -> int:
        """Leave out the images that skip a node, and give the number of the others."""
        assert self.state is not None
        gate, router = getattr(self.stage, f"gate{node}"), getattr(self.stage, f"router{node}")
        if gate.effective_budget() is None:
            return len(self.state.like)
        asked = [] if self.passes is None else self.state.images
        kept = self.state.close_gates(node, gate, router)
        if kept < len(asked):
            self.skipped.update(set(asked) - set(self.state.images))
        return kept

    def apply(self, node: int, block: nn.Module, first: FirstEdge | None = None) -> Tensor | None:
        """As in :class:`Executor`; a block whose norms would average over a part of the batch is refused."""
        if first is not None and first.block_projects:
            refuse_batch_statistics(block)
            return super().apply(node, block, first)
        z = self.read(node, None if first is None else first.source)
        if z is None:
            return None
        refuse_batch_statistics(block)
        return self.given(node, block(z), len(z))

    def finish(self, node: int, feature: Tensor) -> None:
        """As in :class:`Executor`."""
        self.check_shape(node, feature)
        if self.state is None:
            feature = operators.match_layout([feature], feature)[0]
            self.state = start_state(feature, self.nodes, self.stage.gates)
        else:
            feature = operators.match_layout([feature], self.state.like)[0]
        self.state.finish(node, feature, cast(Router, self.own[f"router{node}"]))


class NoGradient(torch.autograd.Function):
    """Give the second argument; raise an error that explains itself when somebody differentiates it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        """Give the second argument."""
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Refuse."""
        raise BadState(f"sparse execution has no gradients; {_NEEDS_DENSE} for them")


def refuse_batch_statistics(module: nn.Module) -> None:
    """Raise BadState if a norm would average over the batch: it would see a part of it."""
    for norm in _compat.find_modules(module, BATCH_NORMS):
        if norm.training or norm.running_mean is None:
            raise BadState(
                f"sparse execution runs a block for a part of the batch, and a {type(norm).__name__} of this "
                f"stage would take its statistics: call model.eval(), or {_NEEDS_DENSE}"
            )


def refuse_shards(stage: DGStage) -> None:
    """Raise BadState if a block or router is sharded by itself: processes would wait for one that skips it."""
    inside = _compat.find_sharded(stage)
    if inside is not None:
        raise BadState(
            f"sparse execution skips blocks, and processes that share the weights of a {type(inside).__name__} wait "
            f"for each other in it: shard whole stages (fully_shard(model.layer1)), or {_NEEDS_DENSE}"
        )


def refuse_recording(x: Tensor) -> None:
    """Raise BadState where a program is recorded or transformed: what is read of one image would hold for all."""
    if not operators.has_values(x):
        raise BadState(
            "sparse execution chooses what to run by the image and can't be traced, exported or transformed; "
            f"{_NEEDS_DENSE} first"
        )


def refuse_training(stage: DGStage) -> None:
    """Raise BadState in training mode."""
    if stage.training:
        raise BadState(f"sparse execution is for evaluation: call model.eval(), or {_NEEDS_DENSE}")


def run_sparse(stage: DGStage, x: Tensor) -> Tensor:
    """Run a stage in sparse execution, for (a part of) a batch; without gradients."""
    executor = Sparse(stage)
    with torch.no_grad():
        out = stage.run(executor, x)
    if executor.passes is not None:
        executor.passes.keep_skips(
            torch.tensor([image in executor.skipped for image in range(len(x))], dtype=torch.bool)
        )
    return out


def without_gradient(stage: DGStage, x: Tensor, out: Tensor) -> Tensor:
    """Tie ``out`` to what would want a gradient, so that who asks for it is told that there is none."""
    if not torch.is_grad_enabled():
        return out
    learning = next((p for p in (x, *stage.parameters()) if p.requires_grad), None)
    return out if learning is None else NoGradient.apply(learning, out)
