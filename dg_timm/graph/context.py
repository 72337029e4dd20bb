"""What one call asks of the stages that it runs, without a mark on the model that other threads share.

:func:`dg_timm.adjacency`, :func:`dg_timm.cost` and the expected cost run a model in another way than its user set.
They say so here, in a context variable: each thread and each asyncio task has its own.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dg_timm.graph.router import Router
    from dg_timm.graph.stage import DGStage


class Recorder(Protocol):
    """Takes what routers and gates give while a stage runs."""

    later: list[tuple[Tensor, "Recorder"]]

    def begin_pass(self, images: Tensor) -> "Recorder":
        """Give a recorder of a cascade's next pass, of the images at these places (k,); ``later`` lists them."""

    def keep(self, stage: "DGStage", node: int, router: "Router", pooled: Tensor, row: Tensor) -> None:
        """Take one node's pooled feature (batch, channels) and the weights of its edges (batch, edges)."""

    def keep_gate(self, stage: "DGStage", node: int, runs: Tensor) -> None:
        """Take for which images a node's gate is open, (batch, 1) bool."""


class Passes(Protocol):
    """The pass of a cascade that is under way (:class:`dg_timm.execution.passes.Pass`)."""

    def run_stage(self, stage: "DGStage", x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a stage for the images that need it; give what it gives for all of the pass."""

    def keep_skips(self, skipped: Tensor) -> None:
        """Take (batch,) bool: which images skipped a block of the stage that runs."""


@dataclass
class GateSampling:
    """How gates are drawn while a cost is learned, and what they were.

    Attributes:
        noise: {stage: (gates, batch)}, what is added to the logits of each gate; None for none.
        budgets: (batch, 1), what each image aims at; None leaves that to the gates.
        drawn: {stage: {node: (batch, 1)}}: 1 where its gate is open and 0 where it is closed, with the gradient of its
            sigmoid. By node, as a checkpointed pass runs again.
    """

    noise: dict["DGStage", Tensor] | None = None
    budgets: Tensor | None = None
    drawn: dict["DGStage", dict[int, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What overrides a model's own settings for one call; None leaves them.

    Attributes:
        execution: ``dense``, ``sparse`` or ``fixed``.
        threshold: of every node.
        recorder: takes the weights of all edges.
        gates: how gates are drawn, while a cost is learned.
        passes: the pass of a cascade that is under way, in sparse execution.
        sets_budget: whether ``budget`` stands in for that of the gates.
        budget: as in :class:`dg_timm.graph.gate.Gate`.
    """

    execution: str | None = None
    threshold: float | None = None
    recorder: Recorder | None = None
    gates: GateSampling | None = None
    passes: Passes | None = None
    sets_budget: bool = False
    budget: float | None = None


_NOTHING = Request()
_request: ContextVar[Request] = ContextVar("dg_timm_request", default=_NOTHING)
# Whether a call of any thread asks for something. torch.compile guards it; torch 2.11 can't read a ContextVar there.
_somebody_asks = False
_asking = 0
_lock = threading.Lock()


def request() -> Request:
    """What the call that is under way asks for."""
    return _request.get() if _somebody_asks else _NOTHING


@contextlib.contextmanager
def requesting(**changes: Any) -> Iterator[None]:
    """Ask for something in this thread until the ``with`` block ends: the attributes of :class:`Request`."""
    token = _request.set(replace(_request.get(), **changes))
    _count_asking(1)
    try:
        yield
    finally:
        _count_asking(-1)
        _request.reset(token)


_by_image: ContextVar[bool] = ContextVar("dg_timm_by_image", default=False)


def is_by_image() -> bool:
    """Whether routers and gates are to give an image the same bits in any batch; never in a compiled program."""
    return not torch.compiler.is_compiling() and _by_image.get()


@contextlib.contextmanager
def by_image() -> Iterator[None]:
    """Let routers and gates of this thread give an image the same bits in any batch: in inference, and a bit slower."""
    token = _by_image.set(True)
    try:
        yield
    finally:
        _by_image.reset(token)


def _count_asking(change: int) -> None:
    global _asking, _somebody_asks
    with _lock:
        _asking += change
        _somebody_asks = _asking > 0
