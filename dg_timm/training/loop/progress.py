"""Count how far a run is; every checkpoint holds it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EpochSums:
    """Sums over the images of the epoch under way, over all processes.

    Attributes:
        loss: sum of the losses.
        metrics: sums of what the objective shows, by name.
        images: how many there were.
        seconds: of training, without checkpoints and evaluation.
    """

    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    images: float = 0.0
    seconds: float = 0.0

    def add(self, loss: float, metrics: Mapping[str, float], images: float, seconds: float) -> None:
        """Add the sums of some updates."""
        self.loss += loss
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value
        self.images += images
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        """Return the mean loss and the mean of every metric; 0 without an image."""
        return {name: total / max(self.images, 1) for name, total in {"loss": self.loss, **self.metrics}.items()}

    @property
    def images_per_second(self) -> float:
        """Throughput of training, rounded to hundredths."""
        return round(self.images / max(self.seconds, 1e-9), 2)


@dataclass
class BestTracker:
    """The best evaluation so far: its metric, its epoch (counted from 1) and the name of its checkpoint."""

    metric: float = -math.inf
    epoch: int = 0
    checkpoint: str = ""

    def offer(self, metric: float, epoch: int, checkpoint: str) -> bool:
        """Take an evaluation if it is better than all before; tell whether it is."""
        better = metric > self.metric
        if better:
            self.metric, self.epoch, self.checkpoint = metric, epoch, checkpoint
        return better


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: number of finished epochs.
        evaluated: number of those that were evaluated.
        update: number of updates of the weights.
        skipped: number of unreadable images that were left out, over all processes.
        sums: of the epoch under way.
        best: evaluation so far.
    """

    epoch: int = 0
    evaluated: int = 0
    update: int = 0
    skipped: int = 0
    sums: EpochSums = field(default_factory=EpochSums)
    best: BestTracker = field(default_factory=BestTracker)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and texts, for JSON."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave."""
        self.epoch, self.evaluated, self.update = state["epoch"], state["evaluated"], state["update"]
        self.skipped = state["skipped"]
        self.sums, self.best = EpochSums(**state["sums"]), BestTracker(**state["best"])

    def start_epoch(self) -> None:
        """Begin the sums anew."""
        self.sums = EpochSums()
