"""Keep the memory of large maps on CPUs for the next ones.

The C library gives large blocks back to the system as soon as they are free, and every block that it takes anew is
filled with zeros page by page: to write a fresh map of 25 MiB takes twice as long as to write one whose pages are
there. PyTorch has a caching allocator for GPUs and none for CPUs; this is one for the maps that aggregation writes. A
block is returned to the cache when the last tensor that uses it is freed. :func:`release` empties the cache.
"""

import collections
import ctypes
import math
import mmap
import weakref

import torch
from torch import Tensor

MIN_BYTES = 2**22  # for smaller maps this costs more than it saves
MAX_CACHED_BYTES = 2**28  # that no tensor uses
_PAGES = 2**21

# Appended to and popped from without a lock: both are atomic, and the garbage collector may give a block back at any
# moment, also in the midst of what follows.
_idle: collections.deque[mmap.mmap] = collections.deque()


def empty_like(x: Tensor, batch: int | None = None) -> Tensor:
    """As ``torch.empty_like`` for a batch of maps that is dense in memory, or for another number of them.

    Same layout, type and device; undefined content.
    """
    shape = (len(x) if batch is None else batch, *x.shape[1:])
    stride = (math.prod(x.shape[1:]), *x.stride()[1:])
    size = math.prod(shape) * x.element_size()
    if size < MIN_BYTES or x.device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
    block = _take(size)
    owner = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(owner, _return_block, block).atexit = False
    storage = torch.frombuffer(owner, dtype=torch.uint8).untyped_storage()
    whole = torch.empty(0, dtype=x.dtype, device="cpu")  # whatever the default device is
    return whole.set_(storage, 0, shape, stride)  # no view: gradients may be added in place


def _take(size: int) -> mmap.mmap:
    """An idle block that fits and is not twice too large, or a new one."""
    for _ in range(len(_idle)):
        try:
            block = _idle.popleft()
        except IndexError:
            break
        if size <= len(block) <= max(2 * size, _PAGES):
            return block
        _idle.append(block)
    block = mmap.mmap(-1, math.ceil(size / _PAGES) * _PAGES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _return_block(block: mmap.mmap) -> None:
    _idle.append(block)
    idle = cached_bytes()
    while idle > MAX_CACHED_BYTES:
        try:
            idle -= len(_idle.popleft())  # goes back to the system
        except IndexError:
            break


def cached_bytes() -> int:
    """Count the bytes that are kept though no tensor uses them."""
    return sum(len(block) for block in tuple(_idle))


def release() -> int:
    """Give what no tensor uses back to the system; give the number of bytes."""
    released = 0
    while True:
        try:
            released += len(_idle.popleft())
        except IndexError:
            return released
