"""The router of one node (paper 3.3, Eqs. 4 and 5; Fig. 3a: a node weighs its output edges)."""

from typing import List, Optional

import torch
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm.graph import edges
from dg_timm.graph.context import is_by_image, request


class Router(nn.Module):
    """Weigh the edges that leave a node: a fully-connected layer on its pooled feature, sigmoid, scale, threshold.

    Args:
        in_chs: channels of the node's feature.
        node: index of the node.
        topology: the sources of every node of the stage (:func:`dg_timm.graph.topology.complete`).
        edge_scale: False drops the scale, so that the weights are the paper's alpha.
        instance_aware: False learns one number an edge, the same for every image, in place of the fully-connected
            layer (paper 6.3: alpha instead of alpha_b).

    Attributes:
        targets: nodes that the edges lead to, in the order of the weights.
        fixed_threshold: what stands in for the learned threshold (:func:`dg_timm.set_threshold`); never saved.
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
        self.targets = [target for target in range(node + 1, len(topology)) if node in topology[target]]
        self.in_degrees = [len(topology[target]) for target in self.targets]
        self.is_instance_aware, self.has_scale = instance_aware, edge_scale
        degree = len(self.targets)
        if instance_aware:
            self.fc = nn.Linear(in_chs, degree, device=device, dtype=dtype)
        else:
            self.logits = nn.Parameter(torch.empty(degree, device=device, dtype=dtype))
        scale = torch.empty(degree, device=device, dtype=dtype)
        self.scale: Optional[nn.Parameter]
        self.register_parameter("scale", nn.Parameter(scale) if edge_scale else None)
        # One dimension, because sharding (FSDP2) takes no scalars. At 0 every edge is open, those of scale 0 too.
        self.threshold = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.fixed_threshold = None
        self.reset_parameters(identity=False)

    @torch.no_grad()
    def reset_parameters(self, identity: bool) -> None:
        """Start from the identity (the edge to the next node at weight 1, others at 0) or the mean of predecessors."""
        for name, parameter in self.named_parameters():
            if name != "scale":
                nn.init.zeros_(parameter)
        if self.scale is not None:
            self.scale.copy_(self.initial_scale(identity))

    def initial_scale(self, identity: bool) -> Tensor:
        """Scales at which the network starts: (edges,), on the CPU."""
        scales = [
            2.0 * (target == self.node + 1) if identity else 2.0 / in_degree
            for target, in_degree in zip(self.targets, self.in_degrees, strict=True)
        ]
        return torch.tensor(scales, device="cpu")

    def is_identity(self) -> bool:
        """Whether the edge to the next node weighs 1 and is open, and all others weigh 0, whatever the image.

        Learned thresholds count, and one that is set. A router whose layer was replaced is none of an identity.
        """
        return (
            self.scale is not None
            and type(getattr(self, "fc", None)) in (nn.Linear, type(None))
            and float(self.scale[0].detach()) == 2.0
            and not bool(self.scale[1:].any())
            and not any(bool(p.any()) for name, p in self.named_parameters() if name not in ("scale", "threshold"))
            and float(self.threshold.detach()) <= 1.0
            and not (self.fixed_threshold is not None and self.fixed_threshold > 1.0)
        )

    def forward(self, pooled: Tensor, active: Optional[Tensor] = None) -> Tensor:
        """Weigh the edges that leave this node.

        Args:
            pooled: (batch, channels), the node's pooled feature.
            active: (batch, 1) bool, False for the images for which this node is removed.

        Returns:
            (batch, edges), in the order of ``targets``; a closed edge is exactly 0.
        """
        logits, by_image = self.compute_logits(pooled), False
        if not torch.jit.is_scripting():
            by_image = is_by_image()
        return edges.edge_weights(logits, self.scale, self.effective_threshold(), active, by_image)

    def compute_logits(self, pooled: Tensor) -> Tensor:
        """What the sigmoid takes: (batch, channels) -> (batch, edges)."""
        if hasattr(self, "fc"):  # TorchScript resolves it
            if not torch.jit.is_scripting():
                logits = edges.apply_linear(self.fc, pooled, is_by_image())
                if isinstance(logits, Tensor) and not torch.jit.is_tracing() and logits.shape[1] != len(self.targets):
                    raise BadValue(
                        f"the layer of router {self.node} gives {logits.shape[1]} numbers for {len(self.targets)} edges"
                    )
                return logits
            return self.fc(pooled)
        else:
            return self.logits.expand(pooled.shape[0], -1)

    def effective_threshold(self) -> Tensor:
        """The threshold in force, (1,): the learned one, unless a call or :func:`dg_timm.set_threshold` fixed it."""
        threshold: Tensor = self.threshold
        fixed = self.fixed_threshold
        if not torch.jit.is_scripting():
            requested = request().threshold
            fixed = fixed if requested is None else requested
        if fixed is not None:
            threshold = torch.full_like(threshold, fixed)
        return threshold

    def extra_repr(self) -> str:
        """Show where the edges lead."""
        return f"targets={self.targets}"
