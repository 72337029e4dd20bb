"""Gradients of a stage in eager mode, at a third of the memory traffic of plain autograd.

Plain autograd would write ``w_ij * g_j`` for every edge and add them up. Here an edge carries its product
``w_ij * x_i`` without forming it: :class:`Edges` gives one alias of the feature to each edge, and :class:`Sum` applies
the weights when a node reads them. The gradient of such a product is the gradient ``g_j`` of the node's input, the
same tensor for all of its edges, and nothing is copied on the way back. Once those of all its edges are there,
:class:`Edges` forms both gradients of a source in one pass: ``dx_i = sum_j w_ij g_j`` and ``dw_ij = <g_j, x_i>``.

So what an edge carries has the value of the feature and the gradient of the product. Only the reader may use it.
Double backward takes the reference formulas.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dg_timm.execution import operators
from dg_timm.execution.operators import channel_means, is_plain, product_gradients, weighted_sum
from dg_timm.graph import edges


def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Give a feature, for :func:`split_to_edges`, and its pooled vector (batch, channels), for the router (Eq. 4)."""
    if x.requires_grad:
        return Pool.apply(x)
    return x, channel_means(x)


def split_to_edges(x: Tensor, row: Tensor) -> Sequence[Tensor]:
    """Give what each edge of a node carries, from its feature and the weights (batch, edges), for :func:`sum_edges`."""
    if x.requires_grad or row.requires_grad:
        return Edges.apply(x, row)
    return [x] * row.shape[1]


def sum_edges(carried: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Add up what edges carry (Eq. 3): from :func:`split_to_edges`, with the weights (batch, edges) given there."""
    if any(edge.requires_grad for edge in carried):
        return Sum.apply(weights.detach(), *carried)
    return weighted_sum(carried, weights.detach())


class Pool(torch.autograd.Function):
    """A feature and the mean of its channels. Backward adds the mean's gradient to the feature's, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Alias the feature, and average its channels."""
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return x.detach(), channel_means(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, of_mean: Tensor | None) -> Tensor | None:
        """Spread the mean's gradient over space."""
        if of_mean is None:
            return gradient
        height, width = ctx.shape[2:]
        spread = (of_mean / (height * width))[:, :, None, None].expand(ctx.shape)
        if gradient is None:
            return spread
        if torch.is_grad_enabled() or not (_has_memory(gradient) and _has_memory(of_mean)):
            return gradient + spread
        return gradient.add_(spread)  # Edges wrote it for this alone


class Edges(torch.autograd.Function):
    """A feature, once for each edge that leaves its node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        """Alias the feature (batch, channels, height, width) for each column of the weights (batch, edges)."""
        ctx.save_for_backward(x, row)
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for _ in range(row.shape[1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Form both gradients from those of the products; an edge that nobody read has none."""
        x, row = ctx.saved_tensors
        read = [j for j, g in enumerate(gradients) if g is not None]
        if not read:
            return None, None
        # by columns: an index would have to reach the device first
        weights = row if len(read) == row.shape[1] else torch.stack([row[:, j] for j in read], dim=1)
        given = [g for g in gradients if g is not None]
        dx: Tensor | None
        dw: Tensor | None
        if torch.is_grad_enabled() or not all(_has_memory(g) for g in given):  # to be differentiated, or batched
            dx = edges.weighted_sum(given, weights).to(x.dtype)
            dw = edges.dot_products(given, x, weights)
        else:
            dx, dw = product_gradients(given, x, weights, *ctx.needs_input_grad)
        if dw is not None and len(read) < row.shape[1]:
            of_read = dict(zip(read, dw.to(row.dtype).unbind(1), strict=True))
            none = torch.zeros_like(row[:, 0])
            dw = torch.stack([of_read.get(j, none) for j in range(row.shape[1])], dim=1)
        return dx, dw


class Sum(torch.autograd.Function):
    """The weighted sum of a node's sources. Backward hands its gradient, as it is, to every edge."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *carried: Tensor) -> Tensor:
        """Apply the weights and add up."""
        return weighted_sum(carried, weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Give each product the gradient of the sum."""
        return (None, *(gradient if needed else None for needed in ctx.needs_input_grad[1:]))


def pass_on(feature: Tensor, z: Tensor, gate: Tensor, runs: Tensor) -> Tensor:
    """As :func:`dg_timm.graph.gate.pass_on`."""
    if feature.requires_grad or z.requires_grad or gate.requires_grad:
        return PassOn.apply(feature, z, gate, runs)
    return operators.pass_on(feature, z, runs)


class PassOn(torch.autograd.Function):
    """A block's feature, or what the node read, image by image. The gate gets the gradient of running."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, z: Tensor, gate: Tensor, runs: Tensor) -> Tensor:
        """Choose."""
        ctx.save_for_backward(feature, z, runs)
        ctx.gate_dtype = gate.dtype
        return torch.where(runs[:, :, None, None], feature, z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Hand the gradient to what was chosen."""
        feature, z, runs = ctx.saved_tensors
        mask = runs[:, :, None, None]
        need_feature, need_z, need_gate, _ = ctx.needs_input_grad
        of_gate = None
        if need_gate:
            worth = (feature - z).nan_to_num(0.0, 0.0, 0.0)
            of_gate = (gradient * worth).sum((1, 2, 3), dtype=ctx.gate_dtype)[:, None]
        of_feature = torch.where(mask, gradient, 0.0) if need_feature else None
        return of_feature, torch.where(mask, 0.0, gradient) if need_z else None, of_gate, None


class TakePart(torch.autograd.Function):
    """The first tensor; the others take part in its graph and get no gradient.

    DistributedDataParallel waits for every parameter. What fixed execution leaves out, or a fixed threshold replaces,
    would keep it waiting; so each is told that there is nothing to come.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, *unused: Tensor) -> Tensor:
        """Alias the first tensor."""
        return out.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient to the first tensor alone."""
        return (gradient, *(None for _ in ctx.needs_input_grad[1:]))


def _has_memory(x: Tensor) -> bool:
    """Whether a gradient is a plain tensor, rather than one of many that are computed at once (is_grads_batched)."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return is_plain(x)
