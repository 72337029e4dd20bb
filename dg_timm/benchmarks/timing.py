"""Time calls that take turns, and the bandwidth of memory beside them.

``torch.utils.benchmark.Timer`` runs a statement twice for every measurement before it looks at the clock, and has no
turns: drifts of the machine would fall on one network. So a round here runs every call once.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


def seconds(run: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Time one call, with all that it left for the device to do."""
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def order_of_round(items: Iterable[Item], number: int) -> Sequence[Item]:
    """Order the items of round ``number``: as they are, and in every second round backwards."""
    items = list(items)
    return items if number % 2 == 0 else items[::-1]


class MemoryCopy:
    """Copy more than the caches hold into memory that exists already: the bandwidth that aggregation can hope for.

    Args:
        device: where the memory is.
        megabytes: size of what is copied, in MiB.

    Attributes:
        bytes: read and written by one call.
    """

    def __init__(self, device: str, megabytes: int = 256) -> None:
        self.source = torch.ones(megabytes * 2**18, device=device)
        self.target = torch.empty_like(self.source).copy_(self.source)
        self.bytes = 2 * self.source.numel() * self.source.element_size()

    def __call__(self) -> None:
        """Copy once."""
        self.target.copy_(self.source)
