"""What adds up maps here: say what runs, compile it ahead of time, release its memory."""

import subprocess
from dataclasses import dataclass

import torch

from dg_timm._errors import BadState
from dg_timm.execution import allocator, backends
from dg_timm.execution.backends import cpu


@dataclass(frozen=True)
class Status:
    """What runs on one device.

    Attributes:
        device: ``cpu``, ``cuda:0`` ...
        backend: ``c``, ``triton`` or ``torch`` (PyTorch's own operations).
        dtypes: that the backend takes; others run by PyTorch's operations.
        cached_bytes: memory of maps that no tensor uses, kept for the next ones (CPU alone).
    """

    device: str
    backend: str
    dtypes: tuple[str, ...]
    cached_bytes: int


def status(device: torch.device | str = "cpu") -> Status:
    """Say what adds up maps on a device. This compiles the kernels if that has not happened yet.

    >>> import dg_timm
    >>> dg_timm.kernels.status().device
    'cpu'
    """
    device = torch.device(device)
    found = cpu.load() if device.type == "cpu" else backends.cuda_kernels(device) if device.type == "cuda" else None
    name = "torch" if found is None else "c" if device.type == "cpu" else "triton"
    dtypes = () if found is None else tuple(sorted(str(dtype).removeprefix("torch.") for dtype in found.dtypes))
    return Status(str(device), name, dtypes, allocator.cached_bytes() if device.type == "cpu" else 0)


def compile(device: torch.device | str = "cpu") -> Status:
    """Compile the kernels now, so that the first prediction of a server does not wait for it (about a second).

    Eight processes that start at once compile once; the others wait.

    Raises:
        BadState: if they can't be compiled, with the reason. (Predictions would run by PyTorch's operations.)

    >>> import dg_timm
    >>> dg_timm.kernels.compile().device
    'cpu'
    """
    if torch.device(device).type == "cpu":
        try:
            cpu.open_library()
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise BadState(f"the kernels can't be compiled: {error}. Install a C compiler with OpenMP (gcc)") from error
    found = status(device)
    if found.backend == "torch":
        raise BadState(f"there are no kernels for {device}, or DG_TIMM_KERNELS=0 turns them off")
    return found


def release_memory() -> int:
    """Give memory that is kept for maps back to the system; give the number of bytes.

    >>> import dg_timm
    >>> dg_timm.kernels.release_memory() >= 0
    True
    """
    return allocator.release()
