"""The weighted sum and its gradient (paper Eq. 3) on GPUs, in Triton; dg_timm/graph/edges.py is the reference.

Imported when the first map on a GPU is added up, and compiled then, once for every number of sources. Every map is
read once, a source of weight 0 not at all. Sums are in float32 (float64 for float64), and so are partial sums where a
node has more sources than one pass reads. Tested in Triton's interpreter, and by tests/execution/test_cuda.py where
there is a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dg_timm.graph import edges

MAPS_A_PASS = 16  # maps that one pass reads
_BLOCK = 1024
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _weighted_sum(  # type: ignore[no-untyped-def]
    out, partial, sources, weights, stride, length, FIRST: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr
):
    image = tl.program_id(0).to(tl.int64)  # there may be more images than the second axis of a grid takes
    offsets = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    at = image * length + offsets
    total = tl.zeros([BLOCK], SUM)
    if not FIRST:
        total = tl.load(partial + at, inside, other=0.0)
    for i in tl.static_range(len(sources)):
        weight = tl.load(weights + image * stride + i)
        read = offsets < tl.where(weight == 0, 0, length)
        total += weight * tl.load(sources[i] + at, read, other=0.0).to(SUM)
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


@triton.jit
def _dots(parts, gradients, x, weights, stride, length, SUM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    image, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offsets = piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    at = image * length + offsets
    own = tl.load(x + at, inside, other=0.0).to(SUM)
    part = parts + (image * tl.num_programs(1) + piece) * len(gradients)
    for j in tl.static_range(len(gradients)):
        weight = tl.load(weights + image * stride + j)
        # behind a closed edge, what is no number leaves no trace
        read = tl.where(tl.abs(own) < float("inf"), own, tl.where(weight == 0, 0.0, own))
        tl.store(part + j, tl.sum(read * tl.load(gradients[j] + at, inside, other=0.0).to(SUM)))


class TritonKernels:
    """As :class:`dg_timm.execution.backends.Kernels`, for dense aggregation on GPUs."""

    dtypes = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

    def weighted_sum(self, out: Tensor, sources: Sequence[Tensor], weights: Tensor) -> None:
        """``out[b] = sum_i weights[b, i] * sources[i][b]``; weights: (batch, n), contiguous, float32 or float64."""
        if out.numel() == 0:
            return
        length = out[0].numel()
        grid = (len(out), triton.cdiv(length, _BLOCK))
        partial = torch.empty_like(out, dtype=weights.dtype) if len(sources) > MAPS_A_PASS else out
        for start in range(0, len(sources), MAPS_A_PASS):
            now = tuple(sources[start : start + MAPS_A_PASS])
            into = out if start + MAPS_A_PASS >= len(sources) else partial
            columns = weights[:, start:]
            with torch.cuda.device_of(out):
                _weighted_sum[grid](
                    into, partial, now, columns, weights.stride(0), length, start == 0, _sum(weights), _BLOCK
                )

    def channel_means(self, out: Tensor, x: Tensor, channels_last: bool) -> None:
        """Write the mean of every channel: (batch, channels)."""
        torch.mean(x, (2, 3), out=out)

    def product_gradients(
        self, dx: Tensor | None, dw: Tensor | None, gradients: Sequence[Tensor], x: Tensor, weights: Tensor
    ) -> None:
        """``dx = sum_j weights[:, j] * gradients[j]`` and ``dw[:, j] = <gradients[j], x>`` of every image."""
        if dx is not None:
            self.weighted_sum(dx, gradients, weights)
        if dw is None or x.numel() == 0:
            return
        length = x[0].numel()
        grid = (len(x), triton.cdiv(length, _BLOCK))
        for start in range(0, len(gradients), MAPS_A_PASS):
            now = tuple(gradients[start : start + MAPS_A_PASS])
            parts = torch.empty(len(x), grid[1], len(now), dtype=weights.dtype, device=x.device)
            with torch.cuda.device_of(x):
                columns = weights[:, start:]
                _dots[grid](parts, now, x, columns, weights.stride(0), length, _sum(weights), _BLOCK)
            dw[:, start : start + len(now)] = parts.sum(1)


def check(kernels: TritonKernels, device: torch.device) -> None:
    """RuntimeError unless the kernels compile here and give the weighted sum and its gradients of a few small maps."""
    ramp = torch.linspace(-1, 1, 210, device=device).view(2, 3, 5, 7)  # no random number of the user's is drawn
    maps, weights = [ramp, ramp.square(), ramp.exp()], torch.linspace(0.1, 2, 6, device=device).view(2, 3)
    z, dw = torch.empty_like(maps[0]), torch.empty_like(weights)
    kernels.weighted_sum(z, maps, weights)
    kernels.product_gradients(None, dw, maps, maps[0], weights)
    dots = torch.stack([(m * maps[0]).sum((1, 2, 3)) for m in maps], dim=1)
    if not (torch.allclose(z, edges.weighted_sum(maps, weights), 1e-4, 1e-4) and torch.allclose(dw, dots, 1e-4, 1e-4)):
        raise RuntimeError(f"they give wrong sums on {device}")


def _sum(weights: Tensor) -> Any:
    return _TYPES[weights.dtype]
