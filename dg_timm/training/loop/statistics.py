"""Sum up losses where they are computed, and bring the sums to the host now and then."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from dg_timm.training.loop.distributed import HostAllReduce
from dg_timm.training.loop.objective import Losses


def masked_sums(losses: Losses, mask: Tensor) -> Tensor:
    """Sum over the images that count: their number, their losses, and each metric; (2 + metrics,) float64."""
    columns = [torch.ones_like(mask), losses.loss, *losses.metrics.values()]
    return torch.stack([(column.detach() * mask).double().sum() for column in columns])


class UpdateStats(NamedTuple):
    """Sums over some updates and all processes.

    Attributes:
        images: how many there were.
        loss: sum of their losses.
        metrics: sums of what the objective shows, by name.
        seconds: that the updates took, on average over the processes.
        update_losses: (updates,) float64; the mean loss of each update.
        rates: learning rate of each update.
    """

    images: float
    loss: float
    metrics: dict[str, float]
    seconds: float
    update_losses: Tensor
    rates: list[float]

    def means(self) -> dict[str, float]:
        """Return the mean of every metric."""
        return {name: total / self.images for name, total in self.metrics.items()}

    @property
    def images_per_second(self) -> float:
        """Throughput over all processes."""
        return self.images / max(self.seconds, 1e-9)

    def first_not_finite(self) -> int | None:
        """Return the place of the first update whose loss is not finite; None if all are."""
        places = (~torch.isfinite(self.update_losses)).nonzero()[:1, 0].tolist()
        return places[0] if places else None


class RunningStats:
    """Sums of updates that the host has not read yet, and a clock that runs while the network trains."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._rates: list[float] = []
        self._names: tuple[str, ...] = ()
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Count seconds from now on."""
        self._since = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Take time off the clock that was not spent on training."""
        self._since += seconds

    def add(self, sums: Tensor, names: tuple[str, ...], rate: float) -> None:
        """Add an update: its :func:`masked_sums`, the names of its metrics, and its learning rate."""
        self._sums.append(sums)
        self._names = names
        self._rates.append(rate)

    def collect(self, all_reduce: HostAllReduce, processes: int) -> UpdateStats | None:
        """Sum up over all processes and begin anew; None without an update. This waits for the device."""
        if not self._sums:
            return None
        recent, rates = torch.stack(self._sums).cpu(), self._rates
        self._sums, self._rates = [], []
        flat = all_reduce.sum(*recent.flatten().tolist(), time.perf_counter() - self._since)
        self.restart_clock()
        table = torch.tensor(flat[:-1], dtype=torch.float64).view(-1, 2 + len(self._names))
        images, loss, *metrics = table.sum(0).tolist()
        named = dict(zip(self._names, metrics, strict=True))
        return UpdateStats(images, loss, named, flat[-1] / processes, table[:, 1] / table[:, 0], rates)
