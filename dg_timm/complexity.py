"""Parameters and multiply-adds of a network, static or dynamic, with every edge open (paper Table 1)."""

from dataclasses import dataclass
from typing import Optional

from torch import Tensor, nn

from dg_timm.stage import DGStage
from dg_timm.stages import run_on_meta


@dataclass(frozen=True)
class Complexity:
    """Counts for one image.

    Attributes:
        params: of the whole model.
        convolutions: multiply-adds of every convolution (of nothing else: ConvNeXt's linear layers are not counted).
        aggregation: multiply-adds of every edge (one for each element of the map that it reads); 0 if static.
    """

    params: int
    convolutions: int
    aggregation: int

    @property
    def multiply_adds(self) -> int:
        return self.convolutions + self.aggregation


def complexity(model: nn.Module, input_size: Optional[tuple[int, int, int]] = None) -> Complexity:
    """Count a model at ``input_size`` (channels, height, width); by default the one of its pretrained configuration.

    Runs on the meta device: nothing is computed and the model is not changed.
    """
    counted = {"convolutions": 0, "aggregation": 0}

    def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            counted["convolutions"] += out[0].numel() * module.weight[0].numel()
        elif isinstance(module, DGStage):
            counted["aggregation"] += module.edge_reads(args[0][0].numel(), out[0].numel())

    run_on_meta(model, count, input_size)
    return Complexity(sum(p.numel() for p in model.parameters()), **counted)
