"""Kernels that add up maps: C on CPUs, Triton on GPUs. Where there are none, PyTorch's operations run."""

import functools
import os
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dg_timm.execution.backends import cpu

_PLAIN = (Tensor, torch.nn.Parameter)


class Kernels(Protocol):
    """What a backend offers. Maps are (batch, ...) of one shape, type and layout, dense in memory."""

    dtypes: frozenset[torch.dtype]

    def weighted_sum(self, out: Tensor, features: Sequence[Tensor], weights: Tensor) -> None:
        """Write ``out[b] = sum_i weights[b, i] * features[i][b]``; weights as from :func:`sum_weights`."""

    def channel_means(self, out: Tensor, x: Tensor, channels_last: bool) -> None:
        """Write the mean of every channel, (batch, channels); where there is nothing faster, by PyTorch's operation."""

    def product_gradients(
        self, dx: Tensor | None, dw: Tensor | None, gradients: Sequence[Tensor], x: Tensor, weights: Tensor
    ) -> None:
        """Write ``dx = sum_j weights[:, j] * gradients[j]`` and ``dw[:, j] = <gradients[j], x>``, image by image."""


def kernels_for(like: Tensor) -> Kernels | None:
    """The kernels for maps like this one; None where PyTorch's operations do."""
    if type(like) not in _PLAIN:  # it may have no memory to look at
        return None
    kind = like.device.type
    kernels: Kernels | None
    if kind == "cpu":
        kernels = cpu.load()
    elif kind == "cuda" and not torch.cuda.is_current_stream_capturing():  # nothing may be compiled or checked then
        kernels = cuda_kernels(like.device)
    else:
        return None
    return kernels if kernels is not None and like.dtype in kernels.dtypes else None


@functools.cache
def cuda_kernels(device: torch.device) -> Kernels | None:
    """The kernels for a GPU, compiled and checked; None where they can't be used (a warning says so, once)."""
    if os.environ.get("DG_TIMM_KERNELS", "1") == "0":
        return None
    try:
        from dg_timm.execution.backends import triton_kernels

        kernels = triton_kernels.TritonKernels()
        triton_kernels.check(kernels, device)
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:  # whatever Triton or its compiler raise: no reason to stop a network that runs without
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(
            f"aggregation on {device} runs on PyTorch's own operations, which is slower: its kernels can't be used "
            f"({reason}). Install Triton and a C compiler, or set DG_TIMM_KERNELS=0 to silence this",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return kernels


def sum_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights as the kernels take them: contiguous, in the type that maps of ``dtype`` are summed in."""
    return weights.detach().to(cpu.sum_dtype(dtype)).contiguous()
