"""Dense and fixed execution: every edge of the topology is multiplied, and every block on it runs, for every image.

No control flow depends on values, so what runs here trains, traces, exports and compiles. In fixed execution the
topology is a part of the stage's edges, and blocks that it leaves out do not run.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dg_timm.execution import autograd, operators
from dg_timm.execution.recompute import Recipes, recomputing
from dg_timm.graph import edges
from dg_timm.graph.context import Recorder
from dg_timm.graph.executor import Executor, FirstEdge, FirstInputs
from dg_timm.graph.router import Router
from dg_timm.graph.stage import DGStage


class Dense(Executor):
    """Runs one batch through the topology of a stage.

    Args:
        stage: the stage.
        topology: the edges that are read, as the sources of every node.
        plain: whether features are ordinary memory (:func:`dg_timm.execution.operators.is_plain`).
        recorder: takes the weights of all edges.
    """

    def __init__(
        self, stage: DGStage, topology: list[list[int]], plain: bool, recorder: Recorder | None = None
    ) -> None:
        self.stage, self.topology, self.plain, self.recorder = stage, topology, plain, recorder
        self.trains = plain and torch.is_grad_enabled()
        nodes = len(topology)
        self.weights: list[dict[int, Tensor]] = [{}] * nodes  # of every node: (batch,) of its edges, by target
        self.carried: list[dict[int, Tensor]] = [{}] * nodes  # ... and what they carry
        self.into: Tensor | None = None  # weights of the edges into the last node that was read
        self.recipes: Recipes | None = None  # while a block runs that trains

    def read(self, node: int, source: Tensor | None = None) -> Tensor | None:
        """As in :class:`Executor`; None if no edge of the topology enters the node."""
        sources = self.topology[node]
        if not sources:
            return None
        weights = self.weigh_inputs(node)
        if source is None:
            carried: Sequence[Tensor] = [self.carried[i][node] for i in sources]
        else:
            carried = autograd.split_to_edges(source, weights) if self.trains else [source]
        return self.sum(carried, weights)

    def weigh_inputs(self, node: int) -> Tensor:
        """The weights of the edges into a node: (batch, in-degree)."""
        self.into = torch.stack([self.weights[i][node] for i in self.topology[node]], dim=1)
        return self.into

    def sum(self, carried: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Add up what edges carry."""
        if not self.trains:
            return operators.weighted_sum(carried, weights, self.plain)
        z = autograd.sum_edges(carried, weights)
        if self.recipes is not None:
            self.recipes.add(z, carried, weights)
        return z

    def apply(self, node: int, block: nn.Module, first: FirstEdge | None = None) -> Tensor | None:
        """As in :class:`Executor`; a block that trains does not keep its input, but computes it again."""
        if not self.trains:
            return super().apply(node, block, first)
        with recomputing() as self.recipes:
            feature = super().apply(node, block, first)
        self.recipes = None
        return feature

    def finish(self, node: int, feature: Tensor) -> None:
        """As in :class:`Executor`."""
        if self.plain:
            self.check_shape(node, feature)
        router: Router = getattr(self.stage, f"router{node}")
        if self.trains:
            feature, pooled = autograd.pool(feature)
        else:
            pooled = operators.channel_means(feature) if self.plain else edges.global_average_pool(feature)
        row = self.weigh(router, node, pooled)
        if self.recorder is not None:
            self.recorder.keep(self.stage, node, router, pooled, row)
        carried = autograd.split_to_edges(feature, row) if self.trains else [feature] * len(router.targets)
        self.carried[node] = dict(zip(router.targets, carried, strict=True))
        # tools that trace symbolically can index a row, and not unpack it
        columns = row.unbind(1) if self.plain else [row[:, k] for k in range(len(router.targets))]
        self.weights[node] = dict(zip(router.targets, columns, strict=True))

    def weigh(self, router: Router, node: int, pooled: Tensor) -> Tensor:
        """The weights of the edges that leave a node: (batch, channels) -> (batch, edges)."""
        return router(pooled) if self.into is None else router(pooled, edges.has_open_input(self.into))


class Checkpointed(Dense):
    """Computes each node again in the backward pass, and keeps nothing of it but its feature."""

    def apply(self, node: int, block: nn.Module, first: FirstEdge | None = None) -> Tensor | None:
        """As in :class:`Executor`."""
        if first is not None and first.block_projects:
            return checkpoint(block, first.source, self.reader(first), use_reentrant=False)
        sources = self.topology[node]
        if not sources:
            return None
        weights = self.weigh_inputs(node)
        carried = [self.carried[i][node] for i in sources]
        if first is not None:
            carried = list(autograd.split_to_edges(first.source, weights)) if self.trains else [first.source]

        def run(weights: Tensor, *carried: Tensor) -> Tensor:
            return block(self.sum(carried, weights))

        return checkpoint(run, weights, *carried, use_reentrant=False)

    def reader(self, first: FirstEdge) -> Callable[[Tensor], FirstInputs | None]:
        """As in :class:`Executor`; the block calls it a second time when it is computed again."""
        into, read = self.into, super().reader(first)

        def read_again(projected: Tensor) -> "FirstInputs | None":
            self.into = into
            return read(projected)

        return read_again


def unused_parameters(stage: DGStage, topology: list[list[int]], fixed_threshold: bool) -> list[nn.Parameter]:
    """Parameters that take no part in a forward pass: of blocks left out, of routers, of thresholds out of force."""
    unused: list[nn.Parameter] = []
    for node in range(len(topology) - 1):
        router = getattr(stage, f"router{node}")
        if node > 0 and not topology[node]:
            unused += [*getattr(stage, stage.block_names[node - 1]).parameters(), *router.parameters()]
        elif fixed_threshold or router.fixed_threshold is not None:
            unused.append(router.threshold)
    return unused
