"""What a dynamic graph network has to compute for an image, given which edges are open (paper 3.4).

A node all of whose input edges are closed is not run, nor is its router, and a closed edge is not read. Everything else
is: stem, head, entry blocks, node 0's projection and router.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from dg_timm.analysis.recorder import adjacency, as_dense
from dg_timm.conversion.find import run_on_meta
from dg_timm.graph.router import Router
from dg_timm.graph.stage import DGStage, graph_stages

_LAYERS = (nn.Conv2d, nn.Linear)


@torch.no_grad()
def cost(model: nn.Module, images: Tensor) -> Tensor:
    """(batch,) float64: multiply-adds run for each image, relative to the static network's.

    Counted are convolutions, linear layers (routers too), and one multiply-add an element that an open edge reads: what
    sparse execution runs, and in static execution the fixed wiring. A network with every edge open costs a little more
    than 1; dense execution always costs that.

    Args:
        model: a dynamic graph network; run in eval mode and left as it was.
        images: (batch, channels, height, width).

    Raises:
        ValueError: if the model is static, or the images have the wrong rank or channels.
    """
    return relative_cost(model, adjacency(model, images), (images.shape[1], images.shape[2], images.shape[3]))


def relative_cost(
    model: nn.Module, alphas: dict[str, Tensor], input_size: Optional[tuple[int, int, int]] = None
) -> Tensor:
    """As :func:`cost`, for adjacencies that are known already ({stage: (batch, N, N)})."""
    opened = {}
    for name, graph in graph_stages(model).items():
        opened[name] = (alphas[name] != 0).double()
        if graph.execution == "static":
            opened[name] = torch.zeros_like(opened[name])
            for target, sources in enumerate(graph.wiring):
                opened[name][:, sources, target] = 1.0
    return count_costs(model, input_size).relative(opened)


@dataclass(frozen=True)
class StageCosts:
    """Multiply-adds of one image: ``nodes``, of the block and router of nodes 1..B; ``edges`` (N, N), of each read."""

    nodes: list[int]
    edges: Tensor


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of one image, by what can be left out.

    Attributes:
        fixed: what always runs.
        static: of the static network.
        stages: what runs where edges are open.
    """

    fixed: int
    static: int
    stages: dict[str, StageCosts]

    def relative(self, opened: dict[str, Tensor]) -> Tensor:
        """(batch,): what runs, relative to the static network.

        Args:
            opened: {stage: (batch, N, N)}, 1 where an edge is open and 0 where it is closed.
        """
        some = next(iter(opened.values()))
        run = torch.full((len(some),), float(self.fixed), dtype=some.dtype, device=some.device)
        for name, stage in self.stages.items():
            is_open = opened[name]
            run = run + (is_open * stage.edges.to(is_open, non_blocking=True)).sum((1, 2))
            for node, own in enumerate(stage.nodes, start=1):
                run = run + own * (1 - (1 - is_open[:, :node, node]).prod(1))
        return run / self.static


def count_costs(model: nn.Module, input_size: Optional[tuple[int, int, int]] = None) -> Costs:
    """Count a dynamic graph network at ``input_size``, by default that of its pretrained configuration."""
    layers: dict[str, int] = {}
    maps: dict[str, tuple[int, int]] = {}  # of a stage: elements of its input, and of a node's feature
    names = {module: name for name, module in model.named_modules()}
    stages = graph_stages(model)

    def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        if isinstance(module, Router):  # its layer is a function, no call of a module
            layers[f"{names[module]}.fc"] = module.fc.weight.numel() if hasattr(module, "fc") else 0
        elif isinstance(module, _LAYERS):
            weight = module.weight[0].numel()
            layers[names[module]] = layers.get(names[module], 0) + out[0].numel() * weight
        elif names.get(module) in stages:
            maps[names[module]] = (args[0][0].numel(), out[0].numel())

    with as_dense(model):
        run_on_meta(model, count, input_size)
    added = tuple(f"{stage}.{name}." for stage, graph in stages.items() for name in graph.graph_modules())
    static = sum(macs for name, macs in layers.items() if not name.startswith(added))
    found = {}
    for name, graph in stages.items():
        nodes = [
            sum(
                macs
                for layer, macs in layers.items()
                if layer.startswith((f"{name}.{block}.", f"{name}.router{node}."))
                and not _is_ready_shortcut(graph, node, layer.removeprefix(f"{name}.{block}."))
            )
            for node, block in enumerate(graph.block_names, start=1)
        ]
        source, feature = maps[name]
        edges = torch.zeros(len(nodes) + 2, len(nodes) + 2, dtype=torch.float64)
        for target, sources in enumerate(graph.edges):
            edges[sources, target] = float(feature)
        # (0, 1) reads the stage's input, before its stride
        edges[0, 1] = graph.edge_reads(source, feature) - (int((edges != 0).sum()) - 1) * feature
        found[name] = StageCosts(nodes, edges)
    removable = sum(own for stage in found.values() for own in stage.nodes)
    return Costs(sum(layers.values()) - removable, static, found)


def _is_ready_shortcut(graph: DGStage, node: int, layer: str) -> bool:
    """Block 1's own downsampling feeds node 0 and runs whether block 1 does or not."""
    if node != 1 or not layer.startswith("downsample."):
        return False
    return hasattr(graph.get_submodule(graph.block_names[0]), "projects_shortcut")


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
