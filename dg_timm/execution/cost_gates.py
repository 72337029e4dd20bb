"""Dense execution while a cost is learned: whether each node runs becomes a number that training can learn from.

Eq. 5 gives almost no gradient for removing a node. A block begins with a convolution and a norm, which hides how small
its input is until the threshold cuts it off. So, while a cost is learned:

- The output of a node is multiplied by its *gate*: exactly 1 or 0, as without it, and with the gradient of the degree
  to which the node's edges are open (straight-through). Through it the loss of the task says what a node is worth to
  an image, and the price what it costs; both move the weights of the edges into it.
- A gate may be noisy (Gumbel noise of two classes, as in ConvNet-AIG, Veit & Belongie, 2018): each image then meets the
  network with and without a node, and later blocks learn to do without. The noise has to be gone by the end.
- The block of a removed node runs on what its closed edges would carry. Nothing reads it, but its norms see features
  in place of zeros, and its gate learns what the node would be worth.

A threshold gets no gradient here. It belongs to a source, so it would close edges into nodes that are not meant, and it
can fall so low that nothing closes any more (both were measured). The weights move instead.
"""

from typing import Any

import torch
from torch import Tensor

from dg_timm.execution.dense import Dense
from dg_timm.graph import edges
from dg_timm.graph.router import Router

# Of the sigmoid over log(|weight| / threshold) by which a gate learns; it is as wide as the noise, if that is more.
SIGMOID_WIDTH = 0.5
TEMPERATURE = 0.5  # of the softmax, over the same, that shares a gate's gradient between the edges into its node
_MIN_THRESHOLD = 1e-3  # that is divided by
_REMOVED_MARGIN = -1e4  # of an edge that leaves a removed node


class Gates:
    """The gates of one stage in one forward pass, for who adds up the cost.

    Attributes:
        gates: of every block, in order, (batch, 1): 1 where it runs and 0 where it is removed, to learn from.
        rows: of nodes 0, 1, ..: (batch, edges), the weights of the edges that leave it, cut and gated.
    """

    def __init__(self, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        """``noise``: scale of the logistic noise on log(|weight| / threshold); ``generator``: on the CPU."""
        self.noise, self.generator = noise, generator
        self.gates: list[Tensor] = []
        self.rows: list[Tensor] = []


class LearningCost(Dense):
    """As :class:`Dense`, with gates."""

    def __init__(self, *args: Any, gates: Gates, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gates = gates
        self.uncut: list[dict[int, Tensor]] = []  # of every node: weights of its edges without a threshold, by target
        self.margins: list[dict[int, Tensor]] = []  # ... and log(|weight| / threshold)

    def weigh_inputs(self, node: int) -> Tensor:
        """The weights with which a block runs. The gate of its node is drawn once, though block 1 may read twice."""
        weights = super().weigh_inputs(node)
        if node == len(self.topology) - 1:
            return weights
        is_open = edges.has_open_input(weights)
        if len(self.gates.gates) < node:
            self.gates.gates.append(self._draw(node, is_open))
        uncut = torch.stack([self.uncut[i][node] for i in self.topology[node]], dim=1)
        return torch.where(is_open, weights, uncut)

    def _draw(self, node: int, runs: Tensor) -> Tensor:
        margins = torch.stack([self.margins[i][node] for i in self.topology[node]], dim=1)
        noise = self.gates.noise
        if noise:
            uniform = torch.rand(runs.shape, generator=self.gates.generator).clamp(1e-6, 1 - 1e-6)
            logistic = uniform.logit().to(margins, non_blocking=True)
            runs = margins.amax(1, keepdim=True) + noise * logistic > 0
        share = torch.softmax(margins.detach() / TEMPERATURE, 1)
        degree = (share * torch.sigmoid(margins / max(noise, SIGMOID_WIDTH))).sum(1, keepdim=True)
        return edges.straight_through(degree, runs.to(degree.dtype))

    def weigh(self, router: Router, node: int, pooled: Tensor) -> Tensor:
        """As in :class:`Dense`; every edge that leaves a node is multiplied by the node's gate."""
        weights = edges.raw_weights(router.compute_logits(pooled), router.scale)
        threshold = router.effective_threshold().detach()
        margins = ((weights.float().abs() + 1e-6) / threshold.float().clamp(min=_MIN_THRESHOLD)).log()
        row = edges.apply_threshold(weights, threshold)
        if node > 0:
            gate = self.gates.gates[node - 1]
            runs = gate.detach() > 0
            row = row * gate.to(row.dtype)
            margins, weights = torch.where(runs, margins, _REMOVED_MARGIN), weights * runs
        self.uncut.append(dict(zip(router.targets, weights.detach().unbind(1), strict=True)))
        self.margins.append(dict(zip(router.targets, margins.unbind(1), strict=True)))
        self.gates.rows.append(row.detach())
        return row
