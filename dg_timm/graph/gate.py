"""The gate of one node: whether an image runs the node's block, or passes on what the block would read.

ConvNet-AIG (Veit & Belongie, 2018) and SkipNet (Wang et al., 2018) gate residual blocks like this. Here a gate is part
of the graph. Pooling is linear, so ``pool(z_j) = sum_i w_ij pool(x_i)``: a node's gate is known from pooled features,
before a map is read. A node j that passes on what it reads is every edge (i, k) past it, of weight ``w_ij w_jk``.
"""

from typing import List, Optional

import torch
from torch import Tensor, nn

from dg_timm.graph import edges
from dg_timm.graph.context import is_by_image, request

OPEN_BIAS = 3.0  # of a new gate: open, and near enough to the step to learn
OPEN_SHIFT = -5.0  # of a new gate: small budgets begin nearer to the step than large ones, or they learn the same


class Gate(nn.Module):
    """Decide for each image whether a node runs: a linear layer on the pooled vector of what the node reads.

    Args:
        in_chs: channels of the node's feature.

    Attributes:
        shift: (1,), what a budget of 0 would add to the logit; learned by networks that serve many budgets.
        budget: share of compute that the gate aims at, 0..1 (:func:`dg_timm.set_budget`). 1: the shift counts for
            nothing. None: the gate is open.
    """

    budget: Optional[float]

    def __init__(
        self,
        in_chs: int,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(in_chs, 1, device=device, dtype=dtype)
        self.shift = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.budget = 1.0
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Open the gate for every image, at a budget of 1."""
        nn.init.zeros_(self.fc.weight)
        nn.init.constant_(self.fc.bias, OPEN_BIAS)
        nn.init.constant_(self.shift, OPEN_SHIFT)

    def forward(self, pooled: Tensor, budgets: Optional[Tensor] = None) -> Tensor:
        """Give the logit of running, open from 0 on.

        Args:
            pooled: (batch, channels), of what the node reads (:func:`pool_inputs`).
            budgets: (batch, 1), of each image, in place of the gate's own.

        Returns:
            (batch, 1), float32 or float64.
        """
        if torch.jit.is_scripting():  # noqa: SIM108  (of a ternary, TorchScript compiles both sides)
            logit = self.fc(pooled)
        else:
            logit = edges.apply_linear(self.fc, pooled, is_by_image())
        if logit.dtype != torch.float64:
            logit = logit.float()
        if budgets is not None:
            return logit + self.shift.to(logit) * (1 - budgets)
        budget = self.effective_budget()
        if budget is None:
            return torch.ones_like(logit)
        return logit + self.shift.to(logit) * (1 - budget)

    def effective_budget(self) -> Optional[float]:
        """The budget in force: the gate's own, unless a call asks for another."""
        budget = self.budget
        if not torch.jit.is_scripting():
            asked = request()
            if asked.sets_budget:
                budget = asked.budget
        return budget

    def extra_repr(self) -> str:
        """Show the budget in force."""
        return f"budget={self.budget}"


def pool_inputs(pooled: List[Tensor], weights: Tensor) -> Tensor:
    """Pool what enters a node, from its sources' pooled vectors: k of (batch, channels) -> (batch, channels).

    As the weighted sum of maps (Eq. 3), it does not read what is behind a closed edge.

    Args:
        pooled: of each source.
        weights: (batch, k), of the edges from them.
    """
    maps = [of_source[:, :, None, None] for of_source in pooled]
    return edges.weighted_sum(maps, weights)[:, :, 0, 0]


def is_open(logit: Tensor) -> Tensor:
    """Say which images run: (batch, 1) -> (batch, 1) bool. A NaN runs: a corrupt image must be seen."""
    return ~(logit < 0)


def pass_on(feature: Tensor, z: Tensor, gate: Tensor, runs: Tensor) -> Tensor:
    """Give what a node puts out: its block's feature where the gate is open, else what the node read.

    Args:
        feature: (batch, channels, height, width), of the block.
        z: of the same shape, what the node read.
        gate: (batch, 1), its value is not read, and it gets the gradient of running, ``<g, feature - z>``.
        runs: (batch, 1) bool.
    """
    out = torch.where(runs[:, :, None, None], feature, z.to(feature.dtype))
    if edges.learns() and gate.requires_grad:
        worth = (feature - z).detach().nan_to_num(0.0, 0.0, 0.0)
        out = out + (gate - gate.detach()).to(feature.dtype)[:, :, None, None] * worth
    return out


def splice(alpha: Tensor, skipped: Tensor) -> Tensor:
    """Turn skipped nodes into edges past them: ``w'_ik = w_ik + w_ij w_jk``; a skipped node stands without edges.

    Args:
        alpha: (batch, N, N), [source, target].
        skipped: (batch, N) bool.

    Returns:
        (batch, N, N).
    """
    for node in range(1, alpha.shape[1] - 1):
        of_node = skipped[:, node]
        if bool(of_node.any()):
            some = alpha[of_node]
            some = some + some[:, :, node, None] * some[:, node, None, :]
            some[:, :, node] = 0.0
            some[:, node, :] = 0.0
            alpha = alpha.index_put((of_node,), some)
    return alpha


def gates(model: nn.Module) -> dict[str, Gate]:
    """The gates of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Gate)}
