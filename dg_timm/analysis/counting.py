"""Count parameters and multiply-adds: of a network, and of what it runs for an image (paper 3.4, Tables 1 and 2).

Counted are convolutions, linear layers (routers too), and one multiply-add for each element that an edge reads. A
network is counted on a copy without numbers; it is not touched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dg_timm._views import run_on_meta
from dg_timm.analysis.recorder import AdjacencyRecorder, record
from dg_timm.execution.passes import leading, may_reuse
from dg_timm.graph.context import requesting
from dg_timm.graph.stage import DGStage, graph_stages

Size = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class LayerCounts:
    """What one forward pass of a network multiplies, for one image.

    Attributes:
        convolutions: {layer: multiply-adds}.
        linear: the same of linear layers.
        edges: {stage: {(source, target): multiply-adds}}, of stages that ran, in order.
        ends: {stage: multiply-adds of all layers that ran until its end}.
    """

    convolutions: dict[str, int]
    linear: dict[str, int]
    edges: dict[str, dict[tuple[int, int], int]]
    ends: dict[str, int]

    @property
    def layers(self) -> dict[str, int]:
        """Convolutions and linear layers."""
        return self.convolutions | self.linear


def count_layers(model: nn.Module, input_size: Size | None = None) -> LayerCounts:
    """Count a network, static or dynamic, with every edge open; ``input_size`` as in :func:`complexity`."""
    counts = LayerCounts({}, {}, {}, {})

    def count(name: str, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            kind = counts.convolutions if isinstance(module, nn.Conv2d) else counts.linear
            kind[name] = kind.get(name, 0) + out[0].numel() * module.weight[0].numel()
        elif isinstance(module, DGStage):
            counts.edges[name] = module.edge_macs(args[0][0].numel(), out[0].numel())
            counts.ends[name] = sum(counts.layers.values())

    with requesting(execution="dense"):
        run_on_meta(model, count, input_size)
    return counts


@dataclass(frozen=True)
class Complexity:
    """What a network holds, and multiplies for one image with every edge open (paper Table 1).

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
        """Convolutions and aggregation together."""
        return self.convolutions + self.aggregation


def complexity(model: nn.Module, input_size: Size | None = None) -> Complexity:
    """Count parameters and multiply-adds of a network, static or dynamic, with every edge open.

    Args:
        model: any image model; not touched.
        input_size: (channels, height, width); by default that of its pretrained configuration.

    >>> import dg_timm, timm
    >>> counted = dg_timm.complexity(timm.create_model("dg_resnet18"))
    >>> counted.params, counted.convolutions, counted.aggregation
    (11695332, 1813561344, 2609152)
    """
    counts = count_layers(model, input_size)
    edges = sum(sum(of_stage.values()) for of_stage in counts.edges.values())
    return Complexity(sum(p.numel() for p in model.parameters()), sum(counts.convolutions.values()), edges)


@torch.no_grad()
def cost(model: nn.Module, images: Tensor) -> Tensor:
    """Count the multiply-adds run for each image, relative to the static network's.

    This is what sparse execution runs, and in fixed execution its topology; of a cascade, all passes together. A
    network with every edge open costs a little more than 1; dense execution always does that much. The model is not
    touched.

    Args:
        model: a dynamic graph network.
        images: (batch, channels, height, width).

    Returns:
        (batch,) float64.

    Raises:
        BadValue: if the model is static, or the images have the wrong rank or channels.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18").eval()
    >>> dg_timm.cost(model, torch.randn(2, 3, 64, 64)).round(decimals=3)
    tensor([1.0010, 1.0010], dtype=torch.float64)
    """
    recorder = record(model, images)
    return recorded_cost(model, recorder, count_costs(model, (images.shape[1], images.shape[2], images.shape[3])))


def recorded_cost(model: nn.Module, recorder: AdjacencyRecorder, counted: "Costs") -> Tensor:
    """As :func:`cost`, for a forward pass that was recorded, all passes of a cascade together: (batch,) float64."""
    total = counted.relative(_opened(model, recorder.recorded))
    if not recorder.later:
        return total
    shared = shared_cost(model, recorder, counted)
    for images, again in recorder.later:
        total[images] += counted.relative(_opened(model, again.recorded)) - shared[images]
        shared[images] = shared_cost(model, again, counted)
    return total


def shared_cost(model: nn.Module, recorder: AdjacencyRecorder, counted: "Costs") -> Tensor:
    """Of a pass that was recorded, what the next one of a cascade need not run again: (batch,) float64."""
    opened = _opened(model, recorder.recorded)
    if not may_reuse(model):
        return torch.zeros_like(counted.relative(opened))
    return counted.shared(opened, recorder.skipped)


def relative_cost(model: nn.Module, alphas: dict[str, Tensor], input_size: Size | None = None) -> Tensor:
    """As :func:`cost`, for adjacencies that are known already ({stage: (batch, N, N)})."""
    return count_costs(model, input_size).relative(_opened(model, alphas))


def _opened(model: nn.Module, alphas: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which edges are read, given the adjacency: {stage: (batch, N, N)} of 1 and 0."""
    opened = {}
    for name, stage in graph_stages(model).items():
        if name not in alphas:  # a stage that does not run
            continue
        opened[name] = (alphas[name] != 0).double()
        if stage.execution == "fixed":
            opened[name] = torch.zeros_like(opened[name])
            for target, sources in enumerate(stage.topology):
                opened[name][:, sources, target] = 1.0
    return opened


@dataclass(frozen=True)
class StageCosts:
    """Multiply-adds of one image: ``nodes``, of the block and router of nodes 1..B; ``edges`` (N, N), of each read."""

    nodes: list[int]
    edges: Tensor

    @property
    def blocks(self) -> list[int]:
        """Of nodes 1..B, with every edge into them."""
        return [own + int(self.edges[:, node].sum()) for node, own in enumerate(self.nodes, start=1)]


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of one image, by what can be left out.

    Attributes:
        always_run: of stem, head, entry blocks, and node 0's projection and router.
        static_total: of the static network.
        stages: of what runs where edges are open.
        always_before: of what always runs until the end of each stage, in the order in which they run.
    """

    always_run: int
    static_total: int
    stages: dict[str, StageCosts]
    always_before: dict[str, int]

    def relative(self, opened: dict[str, Tensor]) -> Tensor:
        """Add up what runs, relative to the static network: (batch,).

        Args:
            opened: {stage: (batch, N, N)}, 1 where an edge is open and 0 where it is closed.
        """
        return (self._by_stage(opened).sum(1) + self.always_run) / self.static_total

    def shared(self, opened: dict[str, Tensor], skipped: dict[str, Tensor]) -> Tensor:
        """Add up what ran in the leading stages of which an image skipped no block, relative to the static network.

        Args:
            opened: as for :meth:`relative`.
            skipped: {stage: (batch, nodes) bool}, of stages with gates.

        Returns:
            (batch,); the cost of all that ran for an image that skipped none at all.
        """
        of_stages = self._by_stage(opened)
        whole = [~skipped[name].any(1) if name in skipped else of_stages[:, 0] >= 0 for name in self.always_before]
        shared = leading(torch.stack(whole, dim=1))
        always = torch.tensor([0, *self.always_before.values()]).to(of_stages)[shared]
        of_leading = torch.cat([torch.zeros_like(of_stages[:, :1]), of_stages.cumsum(1)], dim=1)
        found = of_leading.gather(1, shared[:, None])[:, 0] + always
        everything = shared == len(self.always_before)
        return (found + everything * (self.always_run - always)) / self.static_total

    def _by_stage(self, opened: dict[str, Tensor]) -> Tensor:
        """Add up what runs in each stage where edges are open, in the order in which they run: (batch, stages)."""
        found = []
        for name in self.always_before:
            stage, is_open = self.stages[name], opened[name]
            run = (is_open * stage.edges.to(is_open, non_blocking=True)).sum((1, 2))
            for node, own in enumerate(stage.nodes, start=1):
                run = run + own * (1 - (1 - is_open[:, :node, node]).prod(1))
            found.append(run)
        return torch.stack(found, dim=1)


def count_costs(model: nn.Module, input_size: Size | None = None) -> Costs:
    """Count a dynamic graph network by what can be left out; ``input_size`` as in :func:`complexity`."""
    counts = count_layers(model, input_size)
    stages = {name: stage for name, stage in graph_stages(model).items() if name in counts.edges}
    added = tuple(f"{name}.{child}." for name, stage in stages.items() for child in stage.added_modules())
    static_total = sum(macs for layer, macs in counts.layers.items() if not layer.startswith(added))
    found = {}
    for name, stage in stages.items():
        edges = torch.zeros(len(stage.edges), len(stage.edges), dtype=torch.float64)
        for (source, target), macs in counts.edges[name].items():
            edges[source, target] = float(macs)
        found[name] = StageCosts(_node_macs(name, stage, counts.layers), edges)
    removable, always_before = 0, {}
    for name, layers in counts.ends.items():
        removable += sum(found[name].nodes)
        always_before[name] = layers - removable
    return Costs(sum(counts.layers.values()) - removable, static_total, found, always_before)


def _node_macs(name: str, stage: DGStage, layers: dict[str, int]) -> list[int]:
    """Multiply-adds of the block and router of nodes 1..B, without what always runs.

    A projection for node 0 does, and in a stage with gates every gate and router: an image that skips a node is
    weighed, too.
    """
    found = []
    for node, block in enumerate(stage.block_names, start=1):
        own = (f"{name}.{block}.",) if stage.gates else (f"{name}.{block}.", f"{name}.router{node}.")
        always = f"{name}.{block}.downsample." if node == 1 and stage.input_node == "shortcut" else "\0"
        found.append(sum(m for layer, m in layers.items() if layer.startswith(own) and not layer.startswith(always)))
    return found
