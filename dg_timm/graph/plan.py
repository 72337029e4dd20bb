"""Where a stage is in a static model, and what becomes of its children."""

from dataclasses import dataclass
from typing import Literal

# What node 0's feature is: the stage's input, what block 1's shortcut makes of it, or what a new projection makes of it
InputNode = Literal["input", "shortcut", "projection"]


@dataclass(frozen=True)
class StagePlan:
    """The parts of one stage; made by :func:`dg_timm.conversion.find.find_stages`.

    Attributes:
        name: path of the container in the model.
        entry: names of leading children that change the shape and run before the graph.
        blocks: names of the children that become nodes 1..B.
        input_node: what node 0's feature is.
        in_chs: channels that block 1 takes.
        out_chs: channels of every node's feature.
        stride: of block 1.
        peak_ratio: most numbers that the graph holds at once, for each number of the stage's input; None where a layer
            sees maps of one pixel (squeeze-and-excitation), whose rounding depends on the size of the batch.
    """

    name: str
    entry: tuple[str, ...]
    blocks: tuple[str, ...]
    input_node: InputNode
    in_chs: int
    out_chs: int
    stride: int
    peak_ratio: float | None = None
