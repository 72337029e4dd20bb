"""What the passes of a cascade share, so that no later pass runs it again.

Gates open as the budget rises. An image that ran every block of a stage therefore runs every block of it at the next
budget, too; and as long as that holds from the first stage on, it reads and gives the same. The next pass starts behind
these stages. The model's own code calls the stages, so images *join*: a pass begins with those that have to run all of
it, and each stage adds to what it gives the images that need not run it, from the pass before.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dg_timm._views import default_size, meta_copy
from dg_timm.graph.context import requesting
from dg_timm.graph.gate import Gate, gates
from dg_timm.graph.stage import DGStage

_joins: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


class Pass:
    """One pass of a cascade: which images it runs, and what each stage gave.

    Args:
        images: (rows,) int64, places in the batch; in the order in which they join.
        joins: (rows,) int64, ascending: how many stages each leaves out; none without a pass before.
        before: the pass before, and (rows,) int64, the images' rows in it.

    Attributes:
        outputs: of the stages that ran, in order.
        skips: {stage: (rows,) bool}, which images skipped a block of it.
        repeats: whether a stage ran twice, and gave no single output that another pass could take.
        leave: ends the request that this pass is part of.
    """

    def __init__(
        self, images: Tensor, joins: Tensor | None = None, before: "tuple[Pass, Tensor] | None" = None
    ) -> None:
        self.images, self.before = images, before
        self.joins = torch.zeros_like(images) if joins is None else joins
        self.outputs: dict[DGStage, Tensor] = {}
        self.skips: dict[DGStage, Tensor] = {}
        self.repeats = False
        self.leave = ExitStack()
        self._kept: list[Tensor] = []

    @property
    def starting(self) -> Tensor:
        """Places in the batch of the images that run all of the network."""
        return self.images[self.joins == 0]

    def keep_skips(self, skipped: Tensor) -> None:
        """Take (part,) bool: which images of the next part of the batch skipped a block of the stage that runs."""
        self._kept.append(skipped)

    def run_stage(self, stage: DGStage, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a stage for the images that are here, and let those join that need not run it."""
        self.repeats = self.repeats or stage in self.outputs
        self._kept = []
        before = None if self.before is None else self.before[0].outputs[stage]
        out = before[:0] if before is not None and len(x) == 0 else run(x)
        skips = torch.cat(self._kept) if self._kept else torch.zeros(len(out), dtype=torch.bool)
        if self.before is not None and before is not None:
            rows = self.before[1][self.joins == len(self.outputs) + 1]
            out = torch.cat([out, before[rows]]) if len(rows) else out
            skips = torch.cat([skips, torch.zeros(len(rows), dtype=torch.bool)])
        self.outputs[stage], self.skips[stage] = out, skips
        return out

    def begin_next(self, some: Tensor) -> "Pass":
        """Begin the next pass, of images (places in the batch); without those for which it would change nothing."""
        row_of = torch.zeros(int(self.images.max()) + 1, dtype=torch.int64)
        row_of[self.images] = torch.arange(len(self.images))
        rows = row_of[some]
        skips = torch.zeros(
            len(self.images), len(self.skips), dtype=torch.bool
        )  # who joins later skipped nothing before
        for k, of_stage in enumerate(self.skips.values()):
            skips[: len(of_stage), k] = of_stage
        shared = leading(~skips)[rows]
        changes = (shared < len(self.skips)).nonzero().flatten()
        order = changes[shared[changes].argsort(stable=True)]
        return Pass(some[order], shared[order], (self, rows[order]))


def leading(agree: Tensor) -> Tensor:
    """Count the leading true values of each row: (rows, columns) bool -> (rows,) int64."""
    return agree.long().cumprod(1).sum(1)


def may_reuse(model: nn.Module) -> bool:
    """Whether a pass may start behind stages: gates open as the budget rises, and images can join between stages."""
    own = gates(model).values()
    return all(type(gate) is Gate and gate.shift.item() <= 0 for gate in own) and can_join(model)


def can_join(model: nn.Module) -> bool:
    """Whether every map of a model leads from stage to stage, and none past them.

    Tried once on a copy without numbers: where a map of fewer images meets one of more, shapes do not fit.
    """
    if model not in _joins:
        try:
            _joins[model] = _try_joining(model)
        except Exception:  # whatever a model raises that can't be run so; its passes then share nothing
            _joins[model] = False
    return _joins[model]


def forget(model: nn.Module) -> None:
    """Try again whether images can join, when it is asked next."""
    _joins.pop(model, None)


@torch.no_grad()
def _try_joining(model: nn.Module) -> bool:
    copied: Any = meta_copy(model).eval()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    images = torch.empty(2, *default_size(model), dtype=dtype, device="meta")
    first = Pass(torch.arange(2))
    with requesting(execution="sparse", passes=first):
        copied(images)
    if first.repeats:
        return False
    stages = len(first.outputs)
    joins = torch.arange(stages).repeat_interleave(2)  # two images at a time: one alone would broadcast
    second = Pass(torch.arange(2 * stages), joins, (first, torch.arange(2).repeat(stages)))
    with requesting(execution="sparse", passes=second):
        return len(copied(images)) == 2 * stages
