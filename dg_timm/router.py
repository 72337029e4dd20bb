"""The router of one node (paper 3.3, Eqs. 4 and 5; Fig. 3a: a node weighs its output edges)."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dg_timm.graph import edge_weights


class Router(nn.Module):
    """One fully-connected layer on the pooled feature, sigmoid, times a learned scale per edge, cut at a threshold.

    Args:
        in_chs: channels of the node's feature.
        first_target: index of the node's first successor; the row holds edges to ``first_target..last_target``.
        last_target: index of the stage's output node.
        edge_scale: False drops the scale, so that the weights are the paper's alpha.
        instance_aware: False learns one number an edge, the same for every image, in place of the fully-connected
            layer (paper 6.3: alpha instead of alpha_b).
    """

    fixed_threshold: Optional[float]

    def __init__(
        self,
        in_chs: int,
        first_target: int,
        last_target: int,
        edge_scale: bool = True,
        instance_aware: bool = True,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.first_target = first_target
        self.out_degree = last_target - first_target + 1
        if instance_aware:
            self.fc = nn.Linear(in_chs, self.out_degree, device=device, dtype=dtype)
        else:
            self.logits = nn.Parameter(torch.empty(self.out_degree, device=device, dtype=dtype))
        scale = torch.empty(self.out_degree, device=device, dtype=dtype)
        self.scale: Optional[nn.Parameter]
        self.register_parameter("scale", nn.Parameter(scale) if edge_scale else None)
        # 0 leaves every edge of a fresh network open, also those of scale 0; so does any value below, and it can learn.
        self.threshold = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.fixed_threshold = None  # set_threshold: stands in for the learned one at run time, and is never saved
        self.reset_parameters(identity=False)

    @torch.no_grad()
    def reset_parameters(self, identity: bool) -> None:
        """Start from the identity (only the edge to the next node, at weight 1) or from the mean of predecessors."""
        for name, parameter in self.named_parameters():
            if name != "scale":
                nn.init.zeros_(parameter)
        if self.scale is not None:
            for k in range(self.out_degree):
                in_degree = self.first_target + k
                self.scale[k] = 2.0 * (k == 0) if identity else 2.0 / in_degree

    def forward(self, pooled: Tensor, reached: Optional[Tensor] = None) -> Tensor:
        """Weights of the edges that leave this node: its pooled feature (batch, channels) -> (batch, out-degree).

        ``reached``: (batch, 1) bool, False for the images for which this node is removed.
        """
        return edge_weights(self.logits_of(pooled), self.scale, self.tau(), reached)

    def logits_of(self, pooled: Tensor) -> Tensor:
        """(batch, channels) -> (batch, out-degree), before the sigmoid."""
        if hasattr(self, "fc"):  # TorchScript resolves it
            return F.linear(pooled, self.fc.weight, self.fc.bias)
        else:
            return self.logits.expand(pooled.shape[0], -1)

    def tau(self) -> Tensor:
        """The threshold in force: a scalar."""
        threshold: Tensor = self.threshold
        fixed = self.fixed_threshold
        if fixed is not None:
            threshold = torch.full_like(threshold, fixed)
        return threshold

    def extra_repr(self) -> str:
        return f"targets={self.first_target}..{self.first_target + self.out_degree - 1}"
