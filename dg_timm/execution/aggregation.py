"""Aggregation as it runs (paper Eq. 3): the one place that chooses between the reference and what is faster.

A stage hands every feature to :func:`fan_out`, which gives one tensor for each edge that leaves the node, and every
node reads the edges that enter it with :func:`aggregate`. Where a program is being scripted, traced, exported or
compiled, both are the reference formulas of :mod:`dg_timm.graph.edges`, for that tool to fuse.

In eager mode they are a pair of autograd functions. Plain autograd would write ``w_ij * g_j`` for every edge and add
them up, three to five times the traffic of the forward pass. Here the gradient ``g_j`` of a node's input travels back
along each edge as it is, without a copy, and :class:`FanOut` forms both gradients of a source in one pass over its
targets' once all of them are there: ``dx_i = sum_j w_ij g_j`` and ``dw_ij = <g_j, x_i>``. (What flows between the two
functions is therefore no gradient of its own; nothing else reads these tensors.) Double backward takes the reference
formulas.

A node's input is not kept for the backward pass but gathered again (:func:`recompute`): its sources are kept anyway.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dg_timm.execution import allocator as map_memory
from dg_timm.execution.backends import cpu as cpu_kernels
from dg_timm.graph import edges as graph

PATHS = ("kernels", "torch", "reference")
_PLAIN = (Tensor, torch.nn.Parameter)  # no fx proxies, fake tensors, subclasses of the user's
_path = "kernels"


@contextlib.contextmanager
def path(name: str) -> Iterator[None]:
    """For tests and benchmarks: ``kernels`` (the default), ``torch``'s operations, or the ``reference`` formulas."""
    global _path
    if name not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {name!r}")
    before, _path = _path, name
    try:
        yield
    finally:
        _path = before


def is_fused(x: Tensor) -> bool:
    """Whether the stage that reads ``x`` may use what only eager mode can: functions that look at real memory."""
    if torch.jit.is_scripting():
        return False
    else:
        return _is_fused(x)


@torch.jit.unused
def _is_fused(x: Tensor) -> bool:
    return not (
        _path == "reference"
        or type(x) not in _PLAIN
        or x.is_meta
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
        or x.dtype not in cpu_kernels.SUFFIXES
    )


def fan_out(x: Tensor, row: Tensor, out_degree: int, fused: bool) -> List[Tensor]:
    """A feature and the weights of its edges (batch, out-degree) -> a tensor for each edge, for ``aggregate``."""
    if torch.jit.is_scripting() or not fused:
        return [x for _ in range(out_degree)]
    else:
        return _fan_out(x, row, out_degree)


@torch.jit.unused
def _fan_out(x: Tensor, row: Tensor, out_degree: int) -> List[Tensor]:
    if torch.is_grad_enabled() and (x.requires_grad or row.requires_grad):
        return list(FanOut.apply(x, row))
    return [x] * out_degree


def aggregate(sources: List[Tensor], weights: Tensor, fused: bool) -> Tensor:
    """Eq. 3, as :func:`dg_timm.graph.edges.aggregate`; ``sources`` come from :func:`fan_out` where ``fused``."""
    if torch.jit.is_scripting() or not fused:
        return graph.aggregate(sources, weights)
    else:
        return _aggregate(sources, weights)


@torch.jit.unused
def _aggregate(sources: List[Tensor], weights: Tensor) -> Tensor:
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return Gather.apply(weights.detach(), *sources)
    return gather(sources, weights)


def pool(x: Tensor, fused: bool) -> Tuple[Tensor, Tensor]:
    """A feature, for :func:`fan_out`, and its global average pool (batch, channels), for the router (Eq. 4)."""
    if torch.jit.is_scripting() or not fused:
        return x, graph.pool(x)
    else:
        return _pool(x)


@torch.jit.unused
def _pool(x: Tensor) -> Tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and x.requires_grad:
        return Pool.apply(x)
    return x, pooled(x)


class Pool(torch.autograd.Function):
    """A feature and the mean of its channels. Backward adds the mean's gradient to the feature's, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tuple[Tensor, Tensor]:
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return x.detach(), pooled(x)

    @staticmethod
    def backward(ctx: Any, gradient: Optional[Tensor], of_mean: Optional[Tensor]) -> Optional[Tensor]:
        if of_mean is None:
            return gradient
        height, width = ctx.shape[2:]
        spread = (of_mean / (height * width))[:, :, None, None].expand(ctx.shape)
        if gradient is None:
            return spread
        if torch.is_grad_enabled() or not (_has_memory(gradient) and _has_memory(of_mean)):
            return gradient + spread
        return gradient.add_(spread)  # FanOut wrote it for this alone


class FanOut(torch.autograd.Function):
    """A feature, once for each edge that leaves it. Backward: both gradients, from those of the edges' targets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, row)
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for _ in range(row.shape[1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Optional[Tensor]) -> tuple[Optional[Tensor], Optional[Tensor]]:
        x, row = ctx.saved_tensors
        read = [j for j, g in enumerate(gradients) if g is not None]
        if not read:
            return None, None
        # by columns: an index would have to reach the device first
        weights = row if len(read) == row.shape[1] else torch.stack([row[:, j] for j in read], dim=1)
        given = [g for g in gradients if g is not None]
        if torch.is_grad_enabled() or not all(_has_memory(g) for g in given):  # to be differentiated, or batched
            dx: Optional[Tensor] = graph.aggregate(given, weights).to(x.dtype)
            dots = [(g * x).sum((1, 2, 3)) for g in given]
            dw: Optional[Tensor] = torch.stack(dots, dim=1)
        else:
            dx, dw = fan_out_gradients(given, x, weights, *ctx.needs_input_grad)
        if dw is not None and len(read) < row.shape[1]:
            of_read = dict(zip(read, dw.to(row.dtype).unbind(1), strict=True))
            none = torch.zeros_like(row[:, 0])
            dw = torch.stack([of_read.get(j, none) for j in range(row.shape[1])], dim=1)
        return dx, dw


class Gather(torch.autograd.Function):
    """The weighted sum of a node's sources. Backward hands its gradient, unweighted, to every :class:`FanOut`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *sources: Tensor) -> Tensor:
        return gather(sources, weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        return (None, *(gradient if needed else None for needed in ctx.needs_input_grad[1:]))


# --------------------------------------------------------------------------- recomputation


@contextlib.contextmanager
def recompute(z: Tensor, sources: Sequence[Tensor], weights: Tensor) -> Iterator[None]:
    """While a block runs on ``z``, keep the recipe of ``z`` for the backward pass in its place.

    Where saved tensors have hooks already (activations moved to another device, say) those have their way.
    """
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    if not enabled or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        yield
        return
    again = Recipe(z, sources, weights)

    def pack(saved: Tensor) -> object:
        return again if again.makes(saved) else saved

    def unpack(kept: object) -> Tensor:
        return kept() if isinstance(kept, Recipe) else kept  # type: ignore[return-value]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class Recipe:
    """How to gather a node's input once more."""

    def __init__(self, z: Tensor, sources: Sequence[Tensor], weights: Tensor) -> None:
        self._like = self._identity(z)
        self._sources, self._weights = [source.detach() for source in sources], weights.detach()
        self._versions = [_version(source) for source in self._sources]

    def makes(self, saved: Tensor) -> bool:
        return self._identity(saved) == self._like

    @staticmethod
    def _identity(z: Tensor) -> tuple[object, ...]:
        # the version, too: a block may change its input in place and save what became of it
        return z.data_ptr(), z.shape, z.stride(), z.dtype, _version(z)

    def __call__(self) -> Tensor:
        if [_version(source) for source in self._sources] != self._versions:
            raise RuntimeError(
                "a feature that is needed to compute gradients has been modified by an inplace operation after the "
                "stage read it; modify a clone"
            )
        return gather(self._sources, self._weights)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # those made in inference mode count no changes


# --------------------------------------------------------------------------- the sums themselves, without autograd


@torch.no_grad()
def gather(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``z[b] = sum_i weights[b, i] * sources[i][b]``; (batch, C, H, W), in the layout of the first source."""
    shapes = {tuple(source.shape) for source in sources}
    if len(shapes) > 1 or weights.shape != (len(sources[0]), len(sources)):
        raise ValueError(f"{len(sources)} maps {sorted(shapes)} and weights {tuple(weights.shape)} do not fit")
    sources = alike(sources, sources[0])
    kernels = kernels_for(sources[0])
    if kernels is None:
        return graph.aggregate(list(sources), weights)
    z = map_memory.empty_like(sources[0])
    kernels.gather(z, sources, _summable(weights, z.dtype))
    return z


@torch.no_grad()
def pooled(x: Tensor) -> Tensor:
    """The mean of every channel: (batch, channels, height, width) -> (batch, channels)."""
    kernels, channels_last = kernels_for(x), _is_channels_last(x)
    if kernels is None or x.device.type != "cpu" or not (channels_last or x.is_contiguous()):
        return graph.pool(x)
    means = x.new_empty(x.shape[:2])
    kernels.pool(means, x, channels_last)
    return means


@torch.no_grad()
def fan_out_gradients(
    gradients: Sequence[Tensor], x: Tensor, weights: Tensor, need_dx: bool = True, need_dw: bool = True
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """``dx[b] = sum_j weights[b, j] * gradients[j][b]`` and ``dw[b, j] = <gradients[j][b], x[b]>``."""
    if weights.shape != (len(x), len(gradients)) or any(g.shape != x.shape for g in gradients):
        raise ValueError(f"gradients {[tuple(g.shape) for g in gradients]} do not fit a map {tuple(x.shape)}")
    x = alike([x], x)[0]
    gradients = alike(gradients, x)
    kernels = kernels_for(x)
    if kernels is None:
        dx = graph.aggregate(list(gradients), weights) if need_dx else None
        flat = [t.permute(0, 2, 3, 1).reshape(len(t), 1, -1) if _is_channels_last(t) else t.reshape(len(t), 1, -1)
                for t in (x, *gradients)]  # fmt: skip
        dw = torch.cat([g @ flat[0].mT for g in flat[1:]], dim=1).squeeze(2) if need_dw else None
        return dx, dw if dw is None else dw.to(weights.dtype)
    weights_ = _summable(weights, x.dtype)
    dx, dw = map_memory.empty_like(x) if need_dx else None, torch.empty_like(weights_) if need_dw else None
    kernels.fan_out(dx, dw, gradients, x, weights_)
    return dx, dw if dw is None else dw.to(weights.dtype)


def kernels_for(like: Tensor) -> Any:
    """The kernels for maps like this one (with ``gather`` and ``fan_out``); None where PyTorch's operations do."""
    if _path != "kernels" or like.device.type not in ("cpu", "cuda"):
        return None
    if type(like) not in _PLAIN:  # it may have no memory to look at
        return None
    if like.device.type == "cpu":
        kernels = cpu_kernels.load()
    elif torch.cuda.is_current_stream_capturing():  # nothing may be compiled or checked now
        return None
    else:
        kernels = _cuda_kernels(like.device)
    return kernels if kernels is not None and like.dtype in kernels.dtypes else None


@functools.cache
def _cuda_kernels(device: torch.device) -> Any:
    if os.environ.get("DG_TIMM_KERNELS", "1") == "0":
        return None
    try:
        from dg_timm.execution.backends import cuda as cuda_kernels

        kernels = cuda_kernels.Kernels()
        cuda_kernels.check(kernels, device)
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


def _has_memory(x: Tensor) -> bool:
    """Whether a gradient is a plain tensor, rather than one of many that are computed at once (is_grads_batched)."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return _is_fused(x)


def _summable(weights: Tensor, dtype: torch.dtype) -> Tensor:
    return weights.detach().to(cpu_kernels.sum_dtype(dtype)).contiguous()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def alike(maps: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """The maps in the type and (dense) layout of one of them."""
    layout = torch.channels_last if _is_channels_last(like) else torch.contiguous_format
    return [
        m if m.dtype == like.dtype and m.is_contiguous(memory_format=layout)
        else m.to(like.dtype).contiguous(memory_format=layout)
        for m in maps
    ]  # fmt: skip
