"""Whether each node of a stage runs, as a number that training can learn from.

By Eq. 5 alone a network learns next to nothing about removing a node. The blocks begin with a convolution and a norm,
so that what they put out hardly depends on how small their input is: on the way to the threshold nothing changes, and
behind it the node is gone. So, only while a cost is learned:

- The output of a node is multiplied by its *gate*: exactly 1 or 0, as without it, and with the gradient of the degree
  to which the node's edges are open (straight-through). Through it the loss of the task says what a node is worth to
  an image, and the price what it costs; both move the weights of the edges into it.
- A gate may be noisy (Gumbel noise of two classes, as in ConvNet-AIG, Veit & Belongie, 2018): each image then meets the
  network with and without a node, and later blocks learn to do without. The noise has to be gone by the end.
- The block of a removed node runs on what its closed edges would carry. Nothing reads it, but its norms see features
  in place of zeros, and its gate learns what the node would be worth.

A threshold gets no gradient here: it belongs to a source, so that it would close edges into nodes that are not meant,
and it can fall so low that nothing closes any more (both were measured). The weights move instead.
"""

from typing import Optional

import torch
from torch import Tensor

from dg_timm.graph import edges as graph
from dg_timm.graph.router import Router

# Of the sigmoid over log(|weight| / threshold) by which a gate learns; it is as wide as the noise, if that is more.
WIDTH = 0.5
TEMPERATURE = 0.5  # of the softmax, over the same, that shares a gate's gradient between the edges into its node
_LOWEST = 1e-3  # threshold that is divided by
_NEVER = -1e4  # margin of an edge that leaves a removed node


class Gates:
    """The gates of one stage in one forward pass in dense execution; a stage calls :meth:`enter` and :meth:`leave`.

    Attributes:
        of_nodes: of every block, in order, (batch, 1): 1 where it runs and 0 where it is removed, to learn from.
        rows: of nodes 0, 1, ..: (batch, out-degree), the weights of the edges that leave it, cut and gated.
    """

    def __init__(self, noise: float = 0.0, generator: Optional[torch.Generator] = None) -> None:
        """``noise``: scale of the logistic noise on log(|weight| / threshold); ``generator``: on the CPU."""
        self.noise, self.generator = noise, generator
        self.of_nodes: list[Tensor] = []
        self.rows: list[Tensor] = []
        self._uncut: list[Tensor] = []
        self._margins: list[Tensor] = []  # log(|weight| / threshold)

    def enter(self, weights: Tensor, target: int, sources: list[int]) -> Tensor:
        """Weights of the edges into a block -> those with which it runs; (batch, in-degree) both."""
        margins = graph.column(self._margins, target, sources)
        is_open = graph.reached(weights)
        runs = is_open
        if self.noise:
            uniform = torch.rand(is_open.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
            logistic = uniform.logit().to(margins, non_blocking=True)
            runs = margins.amax(1, keepdim=True) + self.noise * logistic > 0
        share = torch.softmax(margins.detach() / TEMPERATURE, 1)
        degree = (share * torch.sigmoid(margins / max(self.noise, WIDTH))).sum(1, keepdim=True)
        self.of_nodes.append(graph.straight_through(degree, runs.to(degree.dtype)))
        return torch.where(is_open, weights, graph.column(self._uncut, target, sources))

    def leave(self, router: Router, pooled: Tensor) -> Tensor:
        """A node's pooled feature (batch, channels) -> weights of the edges that leave it, (batch, out-degree)."""
        weights = router.uncut(pooled)
        threshold = router.tau().detach()
        margins = ((weights.float().abs() + 1e-6) / threshold.float().clamp(min=_LOWEST)).log()
        row = router.row(graph.close(weights, threshold))
        if self.of_nodes:
            gate = self.of_nodes[-1]
            runs = gate.detach() > 0
            row = row * gate.to(row.dtype)
            margins, weights = torch.where(runs, margins, _NEVER), weights * runs
        self._uncut.append(router.row(weights.detach()))
        self._margins.append(router.row(margins))
        self.rows.append(row.detach())
        return row
