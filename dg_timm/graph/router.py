"""The router of one node (paper 3.3, Eqs. 4 and 5; Fig. 3a: a node weighs its output edges)."""

from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dg_timm.graph.edges import edge_weights


class Router(nn.Module):
    """One fully-connected layer on the pooled feature, sigmoid, times a learned scale per edge, cut at a threshold.

    The row that it gives has a place for every later node; where the topology has no edge there, it is 0.

    Args:
        in_chs: channels of the node's feature.
        node: its index.
        topology: of the stage, the sources of every node (:func:`dg_timm.graph.edges.complete`).
        edge_scale: False drops the scale, so that the weights are the paper's alpha.
        instance_aware: False learns one number an edge, the same for every image, in place of the fully-connected
            layer (paper 6.3: alpha instead of alpha_b).
    """

    fixed_threshold: Optional[float]

    def __init__(
        self,
        in_chs: int,
        node: int,
        topology: List[List[int]],
        edge_scale: bool = True,
        instance_aware: bool = True,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.node = node
        self.out_degree = len(topology) - 1 - node  # in the complete graph
        self.targets = [target for target in range(node + 1, len(topology)) if node in topology[target]]
        self.in_degrees = [len(topology[target]) for target in self.targets]
        self.is_instance_aware = instance_aware
        degree = len(self.targets)
        if instance_aware:
            self.fc = nn.Linear(in_chs, degree, device=device, dtype=dtype)
        else:
            self.logits = nn.Parameter(torch.empty(degree, device=device, dtype=dtype))
        scale = torch.empty(degree, device=device, dtype=dtype)
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
            for k, (target, in_degree) in enumerate(zip(self.targets, self.in_degrees, strict=True)):
                self.scale[k] = 2.0 * (target == self.node + 1) if identity else 2.0 / in_degree

    def forward(self, pooled: Tensor, reached: Optional[Tensor] = None) -> Tensor:
        """Weights of the edges that leave this node: its pooled feature (batch, channels) -> (batch, out-degree).

        ``reached``: (batch, 1) bool, False for the images for which this node is removed.
        """
        return self.row(edge_weights(self.logits_of(pooled), self.scale, self.tau(), reached))

    def uncut(self, pooled: Tensor) -> Tensor:
        """Weights that no threshold cuts: (batch, channels) -> (batch, edges)."""
        weight = torch.sigmoid(self.logits_of(pooled))
        return weight if self.scale is None else weight * self.scale

    def row(self, values: Tensor) -> Tensor:
        """A number for each edge -> one for each later node: (batch, edges) -> (batch, out-degree)."""
        if len(self.targets) == self.out_degree:
            return values
        columns: List[Tensor] = [torch.zeros_like(values[:, :1])] * self.out_degree
        for k in range(len(self.targets)):
            columns[self.targets[k] - self.node - 1] = values[:, k : k + 1]
        return torch.cat(columns, 1)

    def logits_of(self, pooled: Tensor) -> Tensor:
        """(batch, channels) -> (batch, edges), before the sigmoid."""
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
        return f"targets={self.targets}"
