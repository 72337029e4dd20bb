"""Time networks side by side, in one run and on the same images."""

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Timing(NamedTuple):
    """The time of a network beside that of the static one.

    Attributes:
        ratio: median over the rounds of time / static time.
        low, high: quartiles of the same.
        ms, static_ms: median milliseconds for an image, of the network and of the static one.
    """

    ratio: float
    low: float
    high: float
    ms: float
    static_ms: float


def time_ratios(
    static: Callable[[Tensor], Any],
    others: Sequence[Callable[[Tensor], Any]],
    images: Tensor,
    batch_size: int,
    rounds: int,
) -> list[Timing]:
    """Time each of ``others`` over all images, in batches, beside ``static``.

    A round runs every one once, in an order that turns round every time.

    Args:
        images: (images, channels, height, width).
        batch_size: number of images in a batch.
        rounds: at least 2.
    """
    contestants = [static, *others]
    batches = list(images.split(batch_size))

    def seconds(run: Callable[[Tensor], Any]) -> float:
        start = time.perf_counter()
        for batch in batches:
            run(batch)
        return time.perf_counter() - start

    with torch.inference_mode():
        for run in contestants:  # warm up
            run(batches[0])
        table: list[list[float]] = []
        for number in range(rounds):
            order = range(len(contestants)) if number % 2 == 0 else reversed(range(len(contestants)))
            found = {k: seconds(contestants[k]) for k in order}
            table.append([found[k] for k in range(len(contestants))])
    timings = []
    for k in range(1, len(contestants)):
        low, middle, high = quantiles([row[k] / row[0] for row in table], n=4)
        of_static, own = (1000 * median(row[c] for row in table) / len(images) for c in (0, k))
        timings.append(Timing(middle, low, high, own, of_static))
    return timings


def time_columns(size: int, timing: Timing) -> dict[str, Any]:
    """Name the columns of a table for a batch size: ``time_SIZE`` is the ratio, the others say what they are."""
    return {
        f"time_{size}": round(timing.ratio, 3),
        f"time_{size}_low": round(timing.low, 3),
        f"time_{size}_high": round(timing.high, 3),
        f"time_{size}_ms": round(timing.ms, 3),
        f"time_{size}_static_ms": round(timing.static_ms, 3),
    }
