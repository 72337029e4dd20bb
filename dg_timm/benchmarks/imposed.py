"""Impose paths on the images of a batch, in place of what routers would choose.

What this module needs to know of the inside of a stage: its routers are ``router0`` .. ``routerB``, and the executors
read their ``targets`` and call them with a pooled feature and, in dense and fixed execution, with which images are
active. Node 0 comes first in every chunk of a batch.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

import dg_timm
from dg_timm.analysis.counting import count_costs
from dg_timm.graph.router import Router
from dg_timm.graph.stage import DGStage, graph_stages, routers


def complete_topology(model: nn.Module) -> dict[str, Tensor]:
    """Every edge of every stage, for fixed execution: {stage: (N, N) bool}."""
    found = {}
    for name, stage in graph_stages(model).items():
        exists = torch.zeros(len(stage.edges), len(stage.edges), dtype=torch.bool)
        for target, sources in enumerate(stage.edges):
            exists[sources, target] = True
        found[name] = exists
    return found


def open_all_edges(model: nn.Module) -> None:
    """Let every node read the mean of its predecessors, so that no edge has the weight 0."""
    for router in routers(model).values():
        router.reset_parameters(identity=False)


class ImposedPaths:
    """Send every image past a random choice of a stage's blocks. The routers run, and are overruled.

    Args:
        stage: whose routers are replaced; every edge must exist.

    Attributes:
        alpha: (batch, N, N), the edge weights that :meth:`draw` chose last.
    """

    def __init__(self, stage: DGStage) -> None:
        self.blocks = len(stage.block_names)
        self.alpha = torch.empty(0)
        self._chunk = slice(0, 0)  # images of the batch that run now
        for node in range(self.blocks + 1):
            router = stage.get_submodule(f"router{node}")
            assert isinstance(router, Router)
            setattr(stage, f"router{node}", OverruledRouter(router, self, node))

    def draw(self, batch: int, removed: float, one_for_all: bool = False) -> Tensor:
        """Choose new paths, with weights from 0.5 to 1.5.

        Args:
            batch: number of images.
            removed: share of the blocks that a path leaves out, on average.
            one_for_all: give all images one path, as in fixed execution.

        Returns:
            (batch, N, N), the edge weights.
        """
        alpha = torch.zeros(batch, self.blocks + 2, self.blocks + 2)
        for image in range(1 if one_for_all else batch):
            left_out = int(self.blocks * removed + float(torch.rand(())))  # the share on average, also of three blocks
            kept = sorted((torch.randperm(self.blocks)[left_out:] + 1).tolist())
            for source, target in pairwise([0, *kept, self.blocks + 1]):
                alpha[image, source, target] = 0.5 + float(torch.rand(()))
        if one_for_all:
            alpha[:] = alpha[0].clone()
        self.alpha, self._chunk = alpha, slice(0, 0)
        return alpha

    def row(self, node: int, targets: list[int], own: Tensor) -> Tensor:
        """Give the weights of the edges that leave a node, for the images that run now.

        ``own`` (images, edges) is what the router would give.
        """
        if own.is_meta:  # only shapes are asked for
            return own
        images = len(own)
        if node == 0:  # a new chunk of the batch
            start = self._chunk.stop % len(self.alpha)
            self._chunk = slice(start, start + images)
        row = self.alpha[self._chunk, node][:, targets]
        row = row if len(row) == images else row[row.any(1)]  # sparse execution leaves out those that remove the node
        return row.to(own)


class OverruledRouter(nn.Module):
    """Run a router, and give the weights of an imposed path in place of its own."""

    def __init__(self, router: Router, paths: ImposedPaths, node: int) -> None:
        super().__init__()
        self.router, self.paths, self.node = router, paths, node
        self.targets, self.fixed_threshold = router.targets, router.fixed_threshold

    def forward(self, pooled: Tensor, active: Tensor | None = None) -> Tensor:
        """As :meth:`dg_timm.graph.router.Router.forward`: (images, channels) -> (images, edges)."""
        return self.paths.row(self.node, self.targets, self.router(pooled))


class ImposedModel:
    """Impose paths on all stages of a network, and run it in sparse or fixed execution.

    Args:
        model: whose routers are replaced.
        execution: ``sparse``, or ``fixed``, in which all images have one path.
        input_size: channels, height and width of an image, for the cost.
    """

    def __init__(self, model: nn.Module, execution: str, input_size: tuple[int, int, int]) -> None:
        self.model, self.execution = model, execution
        self.costs = count_costs(model, input_size)
        self.paths = {name: ImposedPaths(stage) for name, stage in graph_stages(model).items()}

    def draw(self, batch: int, removed: float) -> float:
        """Choose new paths as :meth:`ImposedPaths.draw` does; return their mean cost."""
        one = self.execution == "fixed"
        alphas = {name: paths.draw(batch, removed, one_for_all=one) for name, paths in self.paths.items()}
        self.set_execution()
        return self.costs.relative({name: (alpha != 0).double() for name, alpha in alphas.items()}).mean().item()

    def set_execution(self) -> None:
        """Run what the paths leave, in the execution that was asked for."""
        topology = None
        if self.execution == "fixed":
            topology = {name: paths.alpha[0] != 0 for name, paths in self.paths.items()}
        dg_timm.set_execution(self.model, self.execution, topology)
