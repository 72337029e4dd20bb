"""The graph of a stage as pure tensor functions: edges, their weights, aggregation (paper 3.1-3.4, Eqs. 3-5).

A stage of B blocks is a complete directed acyclic graph of N = B + 2 nodes: node 0 is the input, nodes 1..B are the
blocks, node B + 1 is the output. Node i has out-degree N - 1 - i and node j has in-degree j. A *row* holds the weights
of the edges that leave one node, ordered by target; a *column* those of the edges that enter one node, ordered by
source.

Here, unlike in the paper: an edge weighs ``scale * sigmoid(...)`` with a learned scale per edge, |weight| is compared
with the threshold, and the adjacency matrix has sources as rows (the paper draws the transpose, 3.4).
"""

from typing import List, Optional

import torch
from torch import Tensor

# Width of the sigmoid that stands in for the step of Eq. 5 when the threshold's gradient is computed. Edge weights of a
# fresh network lie between 1 / in-degree and 1, so 0.1 reaches every edge without flattening the step.
SURROGATE_WIDTH = 0.1


def pool(x: Tensor) -> Tensor:
    """Global average pool (Eq. 4): (batch, channels, height, width) -> (batch, channels)."""
    return x.mean((2, 3))


def edge_weights(logits: Tensor, scale: Optional[Tensor], threshold: Tensor, reached: Optional[Tensor]) -> Tensor:
    """Weights of the edges that leave one node (Eqs. 4 and 5).

    Args:
        logits: (batch, out-degree), the router's fully-connected layer.
        scale: (out-degree,), one learned factor per edge; None for the paper's plain sigmoid.
        threshold: scalar tau of this node; an edge with ``|weight| < tau`` is closed.
        reached: (batch, 1), False where every edge into this node is closed; None for node 0.

    Returns:
        (batch, out-degree). A closed edge is exactly 0, and so is every edge that leaves a removed node.
    """
    weight = torch.sigmoid(logits)
    if scale is not None:
        weight = weight * scale
    weight = close(weight, threshold)
    if reached is None:
        return weight
    hard = torch.where(reached, weight, 0.0)
    return straight_through(weight, hard) if torch.is_grad_enabled() else hard


def close(weight: Tensor, threshold: Tensor, surrogate_width: float = SURROGATE_WIDTH) -> Tensor:
    """Eq. 5: set weights below the threshold to 0; straight-through in backward, so that a closed edge can open again.

    The gradient of ``weight`` passes unchanged. The gradient of ``threshold`` is that of
    ``weight * sigmoid((|weight| - threshold) / surrogate_width)``.
    """
    magnitude = weight.detach().abs()
    if not torch.is_grad_enabled():  # the same numbers in fewer steps
        return torch.where(magnitude < threshold, 0.0, weight)  # NaN is not below, and stays: it must be seen
    is_open = torch.sigmoid((magnitude - threshold) / surrogate_width)
    hard = straight_through(weight, torch.where(magnitude < threshold, 0.0, weight))
    return hard + weight.detach() * (is_open - is_open.detach())  # the second term is 0, and carries tau's gradient


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return soft + (hard - soft).detach()


def complete(num_blocks: int) -> List[List[int]]:
    """The sources of every node of the complete graph, by target: ``[[], [0], [0, 1], ...]``."""
    return [list(range(target)) for target in range(num_blocks + 2)]


def column(rows: List[Tensor], target: int, sources: List[int]) -> Tensor:
    """Weights of the edges that enter node ``target`` from ``sources``: (batch, len(sources))."""
    return torch.stack([rows[i][:, target - 1 - i] for i in sources], dim=1)


def carried(edges: List[List[Tensor]], target: int, sources: List[int]) -> List[Tensor]:
    """What the edges that enter node ``target`` from ``sources`` carry; ``edges[i]`` are those that leave node i."""
    return [edges[i][target - 1 - i] for i in sources]


def reached(weights: Tensor) -> Tensor:
    """(batch, in-degree) -> (batch, 1): whether a node with these input weights has an open edge, or is removed."""
    return (weights.detach() != 0).any(dim=1, keepdim=True)


def aggregate(features: List[Tensor], weights: Tensor) -> Tensor:
    """Eq. 3: ``z = sum_i weights[:, i] * features[i]`` for every image on its own.

    The reference, and what runs where a program is scripted, traced, exported or compiled;
    :mod:`dg_timm.execution.aggregation` has what eager mode runs, and checks against this.

    Args:
        features: maps of one shape, (batch, channels, height, width).
        weights: (batch, len(features)); cast to the maps' dtype.
    """
    edges = weights.to(features[0].dtype).reshape(-1, weights.shape[1], 1, 1, 1).unbind(1)
    z = features[0] * edges[0]
    for i in range(1, len(features)):
        z = torch.addcmul(z, features[i], edges[i])
    return z


def adjacency_matrix(rows: List[Tensor]) -> Tensor:
    """Rows of nodes 0..B -> alpha (paper 3.4): (batch, N, N), [source, target], strictly upper triangular.

    Rows may have further dimensions, which stay last.
    """
    n = len(rows) + 1
    alpha = rows[0].new_zeros([rows[0].shape[0], n, n] + list(rows[0].shape[2:]))
    for i in range(len(rows)):
        alpha[:, i, i + 1 :] = rows[i]
    return alpha
