"""One stage of every kind, apart from any model."""

import torch
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import Bottleneck, downsample_conv
from torch import nn

from dg_timm.conversion.blocks import Projection, output_norm
from dg_timm.conversion.convert import adapt_blocks
from dg_timm.execution.engine import run_stage
from dg_timm.graph.plan import StagePlan
from dg_timm.graph.stage import DGStage
from tests.helpers.networks import randomize, randomize_graph

CHANNELS = 8


def make_stage(kind: str, num_blocks: int, dtype: torch.dtype = torch.float64, **options: bool) -> DGStage:
    """A stage whose node 0 is its input, block 1's shortcut, or a projection; random in every parameter."""
    in_chs = CHANNELS if kind == "input" else CHANNELS // 2
    stride = 1 if kind == "input" else 2
    if kind == "projection":
        blocks = [InvertedResidual(in_chs, CHANNELS, stride=stride, exp_ratio=2.0)]
        blocks += [InvertedResidual(CHANNELS, CHANNELS, exp_ratio=2.0) for _ in range(num_blocks - 1)]
    else:
        down = downsample_conv(in_chs, CHANNELS, 1, stride) if kind == "shortcut" else None
        blocks = [Bottleneck(in_chs, CHANNELS // 4, stride, down)]
        blocks += [Bottleneck(CHANNELS, CHANNELS // 4) for _ in range(num_blocks - 1)]
    names = tuple(str(k) for k in range(num_blocks))
    plan = StagePlan("stage", (), names, kind, in_chs, CHANNELS, stride)
    container = nn.Sequential(*blocks)
    projection = None
    if kind == "projection":
        projection = Projection(in_chs, CHANNELS, stride, num_blocks, output_norm(blocks[0]))
    stage = DGStage(container, plan, engine=run_stage, projection=projection, identity=False, **options)
    adapt_blocks(stage)
    randomize_graph(randomize(stage))
    with torch.no_grad():
        stage.router0.threshold.uniform_(0.5, 1.5)  # around its edge to block 1, the only one that enters it
    return stage.to(dtype)


def images(kind: str, batch: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, CHANNELS if kind == "input" else CHANNELS // 2, 6, 6, dtype=dtype)
