"""Randomly wired networks in the small regime (Xie et al., 2019, Table 1), the rivals in the paper's Table 4.

    timm.create_model("randwire_small", topology="ws", topology_seed=0)

Their topology is random and the same for every image. DG-Net in the same search space (the last row of Table 4) is the
chain of the same nodes, made dynamic:

    dg_timm.dynamize(timm.create_model("randwire_small", topology="chain"), identity=False)
"""

from typing import Any

import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm.conversion.classes import give_name
from dg_timm.graph.edges import weighted_sum
from dg_timm.graph.topology import GENERATORS, build_topology

CHANNELS = 78  # of the first stage; the others have 2 and 4 times as many
NODES = 32  # of each stage
HEAD = 1280  # channels before the classifier
TOPOLOGIES = ("chain", *GENERATORS)

default_cfgs = generate_default_cfgs(
    {
        "randwire_small": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem.0",
            "classifier": "fc",
        }
    }
)


class Node(nn.Module):
    """ReLU, separable 3 x 3 convolution, batch norm (their 3.1).

    Args:
        in_chs: channels of the node's input.
        out_chs: channels of its feature.
        stride: of the 3 x 3 convolution.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.depthwise = nn.Conv2d(in_chs, in_chs, 3, stride, padding=1, groups=in_chs, bias=False)
        self.pointwise = nn.Conv2d(in_chs, out_chs, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_chs)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chs, H, W) -> (batch, out_chs, H / stride, W / stride)."""
        x = self.bn(self.pointwise(self.depthwise(self.act(x))))
        return x


class RandomStage(nn.Module):
    """Nodes that weigh what they read by ``sigmoid(one learned number an edge)``; the output is a plain mean.

    A node that reads the stage's input reads nothing else, has stride 2 and changes the channels.

    Args:
        in_chs: channels of the stage's input.
        out_chs: channels of every node's feature.
        topology: the sources of every node, from :func:`dg_timm.graph.topology.random_topology`.
    """

    def __init__(self, in_chs: int, out_chs: int, topology: list[list[int]]) -> None:
        super().__init__()
        self.topology = topology
        self.nodes = nn.ModuleList(
            Node(in_chs, out_chs, 2) if sources == [0] else Node(out_chs, out_chs, 1) for sources in topology[1:-1]
        )
        self.edges = nn.ParameterList(nn.Parameter(torch.zeros(len(sources))) for sources in topology[1:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chs, H, W) -> (batch, out_chs, H / 2, W / 2)."""
        features = [x]
        for node, logits, sources in zip(self.nodes, self.edges, self.topology[1:-1], strict=True):
            weights = torch.sigmoid(logits).expand(len(x), -1)
            features.append(node(weighted_sum([features[k] for k in sources], weights)))
        return torch.stack([features[k] for k in self.topology[-1]]).mean(0)


@give_name
class RandWire(nn.Module):
    """Two 3 x 3 convolutions with their norms, three stages, a 1 x 1 convolution, the classifier.

    Args:
        topology: edges of every stage: ``chain``, or a random graph of 32 nodes, ``er``, ``ba`` or ``ws``.
        topology_seed: seed of the random graphs; each stage draws its own.
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling before the classifier.
        drop_rate: dropout before the classifier.

    Raises:
        BadValue: for another topology.
    """

    def __init__(
        self,
        topology: str = "ws",
        topology_seed: int = 0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if topology not in TOPOLOGIES:
            raise BadValue(f"topology must be one of {', '.join(TOPOLOGIES)}, got {topology!r}")
        self.num_classes, self.in_chans, self.drop_rate, self.topology = num_classes, in_chans, drop_rate, topology
        self.num_features = self.head_hidden_size = HEAD
        narrow = CHANNELS // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, narrow, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, CHANNELS, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
        )
        topologies = build_topology(
            {str(k): NODES for k in range(3)}, "complete" if topology == "chain" else topology, topology_seed
        )
        stages: list[nn.Module] = []
        chs = CHANNELS
        for k, out_chs in enumerate((CHANNELS, 2 * CHANNELS, 4 * CHANNELS)):
            if topology == "chain":
                blocks = [Node(chs, out_chs, 2), *(Node(out_chs, out_chs, 1) for _ in range(NODES - 1))]
                stages.append(nn.Sequential(*blocks))
            else:
                stages.append(RandomStage(chs, out_chs, topologies[str(k)]))
            chs = out_chs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(chs, HEAD, 1, bias=False), nn.BatchNorm2d(HEAD), nn.ReLU())
        self.global_pool, self.fc = create_classifier(HEAD, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        classifier: nn.Module = self.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Put a new classifier, for other classes, in the place of the present one."""
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(HEAD, num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> (batch, 1280, H / 32, W / 32)."""
        x = self.head(self.stages(self.stem(x)))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(batch, 1280, H, W) -> (batch, num_classes), or (batch, 1280) before the classifier."""
        x = nn.functional.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))


@register_model
def randwire_small(pretrained: bool = False, **kwargs: Any) -> RandWire:
    """Build RandWire in the small regime; ``topology`` (chain, er, ba, ws) and ``topology_seed`` choose its graphs."""
    model: RandWire = build_model_with_cfg(RandWire, "randwire_small", pretrained, **kwargs)
    return model


__all__ = ["RandWire"]
