"""Keep the memory that features leave, instead of asking the system for it again in every update."""

import ctypes
import os
import platform

import torch

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_PAD = 64 * 2**20


def keep_freed_memory(device: torch.device) -> bool:
    """Let this process keep what it frees, for a training on the CPU.

    glibc gives a large tensor back to the system when it is freed, and the next one costs a page fault every 4 KiB: a
    third to two thirds of the time of an update. GPUs have torch's own pool. What keeps memory is the peak of an update
    either way.

    Returns:
        Whether it does: not with another C library or device, nor where the environment tunes ``malloc`` itself
        (``MALLOC_*``, ``GLIBC_TUNABLES``, ``LD_PRELOAD``).
    """
    tuned = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if device.type != "cpu" or tuned or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: _PAD}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
