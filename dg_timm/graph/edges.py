"""The formulas of a graph as pure tensor functions: weights, thresholds, the weighted sum (paper 3.1-3.4, Eqs. 3-5).

A stage of B blocks is a complete directed acyclic graph of N = B + 2 nodes: node 0 is the input, nodes 1..B are the
blocks, node B + 1 is the output. Node i has an edge (i, j) to every later node j.

Two things differ from the paper. An edge weighs ``scale * sigmoid(logit)`` with a learned scale, and ``|weight|`` is
what the threshold is compared with. The adjacency matrix has sources as rows; the paper draws the transpose (3.4).
"""

from typing import List, Optional

import torch
from torch import Tensor, nn

# Width of the sigmoid that stands in for the step of Eq. 5 in the threshold's gradient. The edge weights of a fresh
# network lie between 1 / in-degree and 1, so 0.1 reaches every edge without flattening the step.
SURROGATE_WIDTH = 0.1


def learns() -> bool:
    """Say whether formulas need what only gradients need.

    A trace is for inference: ``torch.jit.trace`` records with gradients and checks without.
    """
    return torch.is_grad_enabled() and not torch.jit.is_tracing()


def global_average_pool(x: Tensor) -> Tensor:
    """Average each channel over space (Eq. 4): (batch, channels, height, width) -> (batch, channels)."""
    return x.mean((2, 3))


def apply_linear(layer: nn.Module, pooled: Tensor, by_image: bool) -> Tensor:
    """Call a router's or gate's fully-connected layer: (batch, channels) -> (batch, out).

    Args:
        layer: whatever stands in its place; a tool may have put an adapter there.
        pooled: (batch, channels).
        by_image: give an image the same bits in any batch, where it is a plain ``nn.Linear``: matrix products take
            another algorithm for another number of images.
    """
    if not by_image or type(layer) is not nn.Linear or layer.bias is None:
        return layer(pooled)
    images, weight = len(pooled), layer.weight.t()
    rows = torch.baddbmm(layer.bias.expand(images, 1, -1), pooled.unsqueeze(1), weight.expand(images, -1, -1))
    return rows.squeeze(1)


def raw_weights(logits: Tensor, scale: Optional[Tensor], by_image: bool = False) -> Tensor:
    """Turn logits (batch, edges) into weights that no threshold has cut (Eq. 4).

    Args:
        logits: (batch, edges).
        scale: (edges,), one learned factor an edge; None gives the paper's plain sigmoid.
        by_image: give an image the same bits in any batch, without a useful gradient. ``torch.sigmoid`` of torch 2.14.1
            rounds the last numbers of a tensor otherwise than the others; ``torch.exp`` does not.
    """
    weight = torch.reciprocal(1 + torch.exp(-logits)) if by_image else torch.sigmoid(logits)
    return weight if scale is None else weight * scale


def edge_weights(
    logits: Tensor,
    scale: Optional[Tensor],
    threshold: Tensor,
    active: Optional[Tensor],
    by_image: bool = False,
) -> Tensor:
    """Weigh the edges that leave one node (Eqs. 4 and 5).

    Args:
        logits: (batch, edges), what the router's fully-connected layer gives.
        scale: (edges,), one learned factor an edge; None for the paper's plain sigmoid.
        threshold: (1,), tau of this node; an edge with ``|weight| < tau`` is closed.
        active: (batch, 1) bool, False where every edge into this node is closed; None for node 0.
        by_image: as in :func:`raw_weights`.

    Returns:
        (batch, edges). A closed edge is exactly 0, and so is every edge that leaves a removed node.
    """
    weight = apply_threshold(raw_weights(logits, scale, by_image), threshold)
    if active is None:
        return weight
    hard = torch.where(active, weight, 0.0)
    return straight_through(weight, hard) if learns() else hard


def apply_threshold(weight: Tensor, threshold: Tensor, surrogate_width: float = SURROGATE_WIDTH) -> Tensor:
    """Close edges (Eq. 5): set weights below the threshold to 0, with a straight-through gradient.

    The gradient of ``weight`` passes unchanged, so that a closed edge can open again. The gradient of ``threshold`` is
    that of ``weight * sigmoid((|weight| - threshold) / surrogate_width)``. A NaN is not below any threshold and stays:
    a corrupt image must be seen.
    """
    magnitude = weight.detach().abs()
    hard = torch.where(magnitude < threshold, 0.0, weight)
    if not learns():
        return hard
    is_open = torch.sigmoid((magnitude - threshold) / surrogate_width)
    # the second term is 0, and carries the threshold's gradient
    return straight_through(weight, hard) + weight.detach() * (is_open - is_open.detach())


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """Give the value of ``hard`` and the gradient of ``soft``."""
    return soft + (hard - soft).detach()


def has_open_input(weights: Tensor) -> Tensor:
    """Say which images have an open edge into a node: weights (batch, in-degree) -> (batch, 1) bool."""
    return (weights.detach() != 0).any(dim=1, keepdim=True)


def weighted_sum(features: List[Tensor], weights: Tensor) -> Tensor:
    """Add up what the edges into a node carry (Eq. 3): ``z = sum_i weights[:, i] * features[i]`` for each image.

    A closed edge is not read: an inf or NaN behind a weight of 0 leaves no trace. This is the reference that every
    backend is checked against, and what runs where a program is scripted, traced, exported or compiled.

    Args:
        features: maps of one shape, (batch, channels, height, width).
        weights: (batch, len(features)); cast to the maps' dtype.
    """
    edges = weights.to(features[0].dtype).reshape(-1, weights.shape[1], 1, 1, 1).unbind(1)
    learning = learns()
    z = _behind(features[0], edges[0], learning) * edges[0]
    for i in range(1, len(features)):
        z = torch.addcmul(z, _behind(features[i], edges[i], learning), edges[i])
    return z


def dot_products(gradients: List[Tensor], x: Tensor, weights: Tensor) -> Tensor:
    """Give the gradient of weights: ``dw[:, j] = <gradients[j], x>`` for each image, (batch, len(gradients)).

    A closed edge learns from the feature behind it, and not from what is not finite there.
    """
    edges = weights.to(x.dtype).reshape(-1, weights.shape[1], 1, 1, 1).unbind(1)
    found = [(gradients[j] * _behind(x, edges[j], True)).sum((1, 2, 3)) for j in range(len(gradients))]
    return torch.stack(found, dim=1).to(weights.dtype)


def _behind(feature: Tensor, weight: Tensor, learning: bool) -> Tensor:
    """What an edge reads: the feature, and nothing that is not finite where the edge is closed."""
    if learning:  # a closed edge still learns from the feature behind it
        return torch.where(weight == 0, feature.nan_to_num(0.0, 0.0, 0.0), feature)
    return torch.where(weight == 0, 0.0, feature)


def adjacency_matrix(rows: List[Tensor], targets: List[List[int]]) -> Tensor:
    """Assemble alpha (paper 3.4), (batch, N, N), [source, target], from the rows of nodes 0..B.

    Args:
        rows: of each node, (batch, edges, ...): what belongs to the edges that leave it. Further dimensions stay last.
        targets: of each node, where its edges lead.
    """
    n = len(rows) + 1
    alpha = rows[0].new_zeros([rows[0].shape[0], n, n] + list(rows[0].shape[2:]))
    for i in range(len(rows)):
        alpha[:, i, targets[i]] = rows[i]
    return alpha
