"""The interface between a stage's loop and the ways to run it: dense, sparse, fixed, learning a cost."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dg_timm._errors import BadValue

# What block 1 reads, and its shortcut
FirstInputs = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class FirstEdge:
    """What the edge (0, 1) carries where node 0's feature is a projection of the stage's input.

    Attributes:
        source: (batch, in_chs, height, width), the stage's input; block 1 reads it, times the edge's weight.
        block_projects: whether block 1 owns the projection. It is then called as ``block(source, read)`` and calls
            ``read(projected)`` for its input and shortcut.
        has_shortcut: whether block 1 adds the projection, times the edge's weight, as its shortcut.
    """

    source: Tensor
    block_projects: bool
    has_shortcut: bool


class Executor(ABC):
    """Runs the graph of one stage for one batch; :meth:`dg_timm.graph.stage.DGStage.run` calls it node by node."""

    shape: torch.Size | None = None  # (channels, height, width) of every node's feature, once node 0 has one
    checks = True  # what blocks give; where a program is recorded, nothing may depend on it

    @abstractmethod
    def read(self, node: int, source: Tensor | None = None) -> Tensor | None:
        """Give the weighted sum that enters a node (Eq. 3), or None if the node runs for no image.

        ``source`` is what the edge from node 0 carries, if not node 0's feature.
        """

    @abstractmethod
    def finish(self, node: int, feature: Tensor) -> None:
        """Take a node's feature, and weigh the edges that leave the node (Eqs. 4 and 5)."""

    def apply(self, node: int, block: nn.Module, first: FirstEdge | None = None) -> Tensor | None:
        """Run a block on what enters its node; give its feature, or None if the node runs for no image.

        ``first`` is for node 1, where node 0's feature is a projection.
        """
        if first is not None and first.block_projects:
            return self.project(block, first)
        z = self.read(node, None if first is None else first.source)
        if z is None or not self.checks:
            return None if z is None else block(z)
        return self.given(node, block(z), len(z))

    def project(self, block: nn.Module, first: FirstEdge) -> Tensor | None:
        """Run a block 1 that owns the projection; raise BadValue for one that was put there and does not."""
        if not self.checks:
            return block(first.source, self.reader(first))
        try:
            return block(first.source, self.reader(first))
        except TypeError as error:
            if getattr(block, "projects_shortcut", False):
                raise
            raise BadValue(
                f"block 1 of a stage makes node 0's feature, too, which a {type(block).__name__} can't: put a block of "
                f"the same kind in its place by index (stage[0] = block), which says what it must do ({error})"
            ) from error

    @staticmethod
    def given(node: int, feature: Tensor | None, images: int) -> Tensor:
        """Give what a block made of so many images; raise BadValue if it made nothing, or of another number."""
        if feature is None:
            raise BadValue(f"block {node} of a stage returned None; does its forward lack a return?")
        if isinstance(feature, Tensor) and feature.shape[:1] != (images,):
            raise BadValue(
                f"block {node} of a stage gave a feature of shape {tuple(feature.shape)} for {images} images: a block "
                "must keep the batch"
            )
        return feature

    def check_shape(self, node: int, feature: Tensor) -> None:
        """Raise BadValue unless a node's feature has the shape that node 0's has."""
        if not isinstance(feature, Tensor):
            raise BadValue(f"block {node} of a stage gave a {type(feature).__name__} in place of a tensor")
        if self.shape is None:
            self.shape = feature.shape[1:]
        elif feature.shape[1:] != self.shape:
            raise BadValue(
                f"block {node} of a stage gave features of shape {tuple(feature.shape[1:])}, and node 0's has shape "
                f"{tuple(self.shape)}: every block of a stage must give one shape. Was it replaced?"
            )

    def reader(self, first: FirstEdge) -> Callable[[Tensor], FirstInputs | None]:
        """What a block 1 that owns the projection calls with what it projected."""

        def read(projected: Tensor) -> "FirstInputs | None":  # a string: torch.compile runs this line
            self.finish(0, projected)
            z = self.read(1, first.source)
            return None if z is None else (z, self.read(1) if first.has_shortcut else None)

        return read
