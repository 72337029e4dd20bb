"""How to train, what a task does around the loop, and what can end it early."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dg_timm._errors import BadState
from dg_timm.training.loop.optimization import BatchSplit
from dg_timm.training.loop.report import Row


class NonFiniteLoss(BadState):
    """The loss or the weights are no longer finite; nothing of it has been saved."""


class Interrupted(Exception):
    """A signal asked for the end; the run is saved. ``signal`` is its number."""

    def __init__(self, signal: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {signal}; saved {checkpoint}")
        self.signal = signal


@dataclass(frozen=True)
class TrainerConfig:
    """How to train, apart from network, data and loss.

    Attributes:
        epochs: how many to train.
        split: how the images of an update are shared.
        updates_per_epoch: how many the schedule counts on.
        updates: end after so many updates; None trains all epochs.
        clip_grad, clip_mode: bound of the gradients, and ``norm``, ``value`` or ``agc``; None clips nothing.
        save_every: number of updates between checkpoints within an epoch; 0 for none.
        log_every: number of updates after which the host reads the loss.
        patience: number of epochs without a better evaluation before stopping; None never stops early.
        fixed_norms: leave all norm statistics as they are.
        dist_bn: ``reduce`` (average) or ``broadcast`` (the main process's): norm statistics after an epoch.
        channels_last: memory layout of the images.
    """

    epochs: int
    split: BatchSplit
    updates_per_epoch: int
    updates: int | None = None
    clip_grad: float | None = None
    clip_mode: str = "norm"
    save_every: int = 0
    log_every: int = 10
    patience: int | None = None
    fixed_norms: bool = False
    dist_bn: str = "reduce"
    channels_last: bool = False


@dataclass(frozen=True)
class Callbacks:
    """What a task does around the loop.

    Attributes:
        evaluate: returns a row of figures, the same in every process, with ``metric``, of which more is better.
        on_epoch: is called with the epoch's number, counted from 0, before each.
        gather_best: after an evaluation that is the best so far, is called in every process with its row, and returns
            the network that is to be kept.
        on_best: is then called in the main process, with both.
    """

    evaluate: Callable[[], Row]
    on_epoch: Callable[[int], None] = lambda epoch: None
    gather_best: Callable[[Row], Any] = lambda row: None
    on_best: Callable[[Row, Any], None] = lambda row, network: None
