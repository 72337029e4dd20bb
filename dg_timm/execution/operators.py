"""The weighted sum of a node's inputs (paper Eq. 3) as it runs: one operator, and the backend behind it.

``torch.ops.dg_timm.weighted_sum`` is what every eager execution calls. Its CPU and CUDA implementations choose a
backend; torch knows its shape, its derivative and how to batch it, so that dispatch modes and fake tensors see one
operation. Forward-mode differentiation through an operator gives zeros without a word, so :func:`weighted_sum` takes
the reference formula there.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from dg_timm import _compat
from dg_timm._errors import BadState, BadValue
from dg_timm.execution import allocator, backends
from dg_timm.graph import edges

BACKENDS = ("kernels", "torch", "reference")
_PLAIN = (Tensor, torch.nn.Parameter)  # no fx proxies, fake tensors, subclasses of the user's
_backend: ContextVar[str] = ContextVar("dg_timm_backend", default="kernels")


@contextlib.contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Aggregate by ``kernels`` (the default), ``torch``'s operations, or the ``reference`` formulas, in this thread.

    The first two have gradients that share memory traffic (:mod:`dg_timm.execution.autograd`); the last is plain.
    """
    if name not in BACKENDS:
        raise BadValue(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is ordinary memory in eager mode: no program is recorded, compiled or transformed."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or torch.jit.is_tracing()
        or _compat.is_transformed()
        or _backend.get() == "reference"
    )


def has_values(x: Tensor) -> bool:
    """Whether the numbers of ``x`` can be read now, and what is read holds for this call alone."""
    return not (
        type(x) not in _PLAIN
        or torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or _compat.is_transformed()
        or _compat.records_a_program()
    )


def uses_kernels() -> bool:
    """Whether kernels may run, rather than another backend that was asked for."""
    return _backend.get() == "kernels"


def weighted_sum(features: Sequence[Tensor], weights: Tensor, plain: bool = True) -> Tensor:
    """Give ``z[b] = sum_i weights[b, i] * features[i][b]``; a feature behind a weight of 0 is not read.

    Args:
        features: maps of one shape (batch, channels, height, width), of any floating type.
        weights: (batch, len(features)).
        plain: False takes the reference formula.

    Returns:
        A map in type and layout of the first feature.

    Raises:
        BadValue: if shapes do not fit.
    """
    if not plain:
        return edges.weighted_sum(list(features), weights)
    if torch.is_grad_enabled() or _compat.is_watched():
        return _weighted_sum_op(features, weights)
    return _implementation(features, weights)  # what the operator would do, 4 microseconds sooner


def check_fit(features: Sequence[Tensor], weights: Tensor) -> None:
    """Raise BadValue unless all maps have one shape and there is a weight for each of every image."""
    first = features[0].shape
    if any(feature.shape != first for feature in features) or weights.shape != (first[0], len(features)):
        shapes = sorted({tuple(feature.shape) for feature in features})
        raise BadValue(
            f"{len(features)} features {shapes} and weights {tuple(weights.shape)} do not fit: every block of a stage "
            "must give the shape that the others give, and there is one weight an image and edge"
        )


_library = torch.library.Library("dg_timm", "DEF")
_library.define("weighted_sum(Tensor[] features, Tensor weights) -> Tensor")


def _implementation(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    check_fit(features, weights)
    if _compat.is_forward_mode():
        raise BadState("torch.ops.dg_timm.weighted_sum has no forward-mode derivative; graph.edges.weighted_sum has")
    features = match_layout(features, features[0])
    kernels = backends.kernels_for(features[0]) if uses_kernels() else None
    if kernels is None:
        with torch.no_grad():
            return edges.weighted_sum(list(features), weights)
    z = allocator.empty_like(features[0])
    kernels.weighted_sum(z, features, backends.sum_weights(weights, z.dtype))
    return z


def _shape(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    check_fit(features, weights)
    return torch.empty_like(features[0])


def _keep(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor], output: Tensor) -> None:
    features, weights = inputs
    ctx.save_for_backward(weights, *features)


def _derivative(ctx: Any, gradient: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
    weights, *features = ctx.saved_tensors
    columns = weights.to(gradient.dtype)[:, :, None, None, None].unbind(1)
    of_weights = [edges.dot_products([gradient], x, weights[:, k, None]) for k, x in enumerate(features)]
    return [gradient * column for column in columns], torch.cat(of_weights, 1)


def _batched(info: Any, in_dims: Any, features: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, int]:
    feature_dims, weight_dim = in_dims

    def front(x: Tensor, dim: int | None) -> Tensor:
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    maps = [front(x, dim) for x, dim in zip(features, feature_dims, strict=True)]
    flat = [x.flatten(0, 1) for x in maps]
    return weighted_sum(flat, front(weights, weight_dim).flatten(0, 1)).unflatten(0, maps[0].shape[:2]), 0


_library.impl("weighted_sum", _implementation, "CompositeExplicitAutograd")
torch.library.register_fake("dg_timm::weighted_sum", _shape, lib=_library)
torch.library.register_autograd("dg_timm::weighted_sum", _derivative, setup_context=_keep, lib=_library)
torch.library.register_vmap("dg_timm::weighted_sum", _batched, lib=_library)
_weighted_sum_op = torch.ops.dg_timm.weighted_sum.default


@torch.no_grad()
def channel_means(x: Tensor) -> Tensor:
    """Average every channel (Eq. 4), without gradients: (batch, channels, height, width) -> (batch, channels)."""
    channels_last = is_channels_last(x)
    kernels = backends.kernels_for(x) if uses_kernels() else None
    if kernels is None or x.device.type != "cpu" or not (channels_last or x.is_contiguous()):
        return edges.global_average_pool(x)
    means = x.new_empty(x.shape[:2])
    kernels.channel_means(means, x, channels_last)
    return means


@torch.no_grad()
def pass_on(feature: Tensor, z: Tensor, runs: Tensor) -> Tensor:
    """As :func:`dg_timm.graph.gate.pass_on`, without gradients; ``feature`` is not read where the gate is closed."""
    if feature.device.type != "cpu":
        return torch.where(runs[:, :, None, None], feature, z)
    if bool(runs.all()):  # on a CPU this costs nothing, and saves a copy
        return feature
    return torch.where(runs[:, :, None, None], feature, z)


@torch.no_grad()
def product_gradients(
    gradients: Sequence[Tensor], x: Tensor, weights: Tensor, need_dx: bool = True, need_dw: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients of the products ``weights[:, j] * x``, in one pass over what reaches them.

    Args:
        gradients: of each product, maps of the shape of ``x``.
        x: (batch, channels, height, width).
        weights: (batch, len(gradients)).

    Returns:
        ``dx[b] = sum_j weights[b, j] * gradients[j][b]`` and ``dw[b, j] = <gradients[j][b], x[b]>``.
    """
    if weights.shape != (len(x), len(gradients)) or any(g.shape != x.shape for g in gradients):
        raise BadValue(f"gradients {[tuple(g.shape) for g in gradients]} do not fit a feature {tuple(x.shape)}")
    x = match_layout([x], x)[0]
    gradients = match_layout(gradients, x)
    kernels = backends.kernels_for(x) if uses_kernels() else None
    if kernels is None:
        dx = edges.weighted_sum(list(gradients), weights) if need_dx else None
        dw = edges.dot_products(list(gradients), x, weights) if need_dw else None
        return dx, dw
    summed = backends.sum_weights(weights, x.dtype)
    dx, dw = allocator.empty_like(x) if need_dx else None, torch.empty_like(summed) if need_dw else None
    kernels.product_gradients(dx, dw, gradients, x, summed)
    return dx, dw if dw is None else dw.to(weights.dtype)


def is_channels_last(x: Tensor) -> bool:
    """Whether a map is stored pixel by pixel; a map that is contiguous both ways counts as channel by channel."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def match_layout(maps: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Give maps the type and (dense) layout of one of them."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return [
        m if m.dtype == like.dtype and m.is_contiguous(memory_format=layout)
        else m.to(like.dtype).contiguous(memory_format=layout)
        for m in maps
    ]  # fmt: skip
