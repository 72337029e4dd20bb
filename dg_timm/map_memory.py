"""Memory of large maps on CPUs, taken once and used again.

The C library gives large blocks back to the system as soon as they are free, and every block that it takes anew is
filled with zeros page by page: to write a fresh map of 25 MiB takes twice as long as to write one whose pages are
there. PyTorch has a caching allocator for GPUs and none for CPUs; this is one for the maps that aggregation writes. A
block comes back when the last tensor on it is gone, whoever held it.
"""

import ctypes
import math
import mmap
import threading
import weakref
from typing import Optional

import torch
from torch import Tensor

SMALLEST = 2**22  # bytes; for smaller maps this costs more than it saves
MOST_IDLE = 2**28  # bytes kept though no tensor uses them
_PAGES = 2**21

_idle: list[mmap.mmap] = []
_lock = threading.Lock()


def empty_like(x: Tensor, batch: Optional[int] = None) -> Tensor:
    """As ``torch.empty_like`` for a batch of maps that is dense in memory, or for another number of them.

    Same layout, type and device; undefined content.
    """
    shape = (len(x) if batch is None else batch, *x.shape[1:])
    stride = (math.prod(x.shape[1:]), *x.stride()[1:])
    size = math.prod(shape) * x.element_size()
    if size < SMALLEST or x.device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
    block = _take(size)
    owner = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(owner, _give_back, block).atexit = False
    storage = torch.frombuffer(owner, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, shape, stride)  # no view: gradients may be added in place


def _take(size: int) -> mmap.mmap:
    """The smallest idle block that fits and is not twice too large, or a new one."""
    with _lock:
        fitting = [block for block in _idle if size <= len(block) <= max(2 * size, _PAGES)]
        if fitting:
            block = min(fitting, key=len)
            _idle.remove(block)
            return block
    block = mmap.mmap(-1, math.ceil(size / _PAGES) * _PAGES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    with _lock:
        _idle.append(block)
        while sum(map(len, _idle)) > MOST_IDLE:
            _idle.pop(0)  # the one that has been idle longest goes back to the system
