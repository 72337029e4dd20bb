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
from dg_timm.graph.context import GateSampling, Recorder
from dg_timm.graph.executor import Executor, FirstEdge, FirstInputs
from dg_timm.graph.gate import Gate, is_open, pass_on, pool_inputs
from dg_timm.graph.router import Router
from dg_timm.graph.stage import DGStage


class Dense(Executor):
    """Runs one batch through the topology of a stage.

    Args:
        stage: the stage.
        topology: the edges that are read, as the sources of every node.
        plain: whether features are ordinary memory (:func:`dg_timm.execution.operators.is_plain`).
        recorder: takes the weights of all edges, and what the gates say.
        sampling: how gates are drawn, while a cost is learned.
    """

    def __init__(
        self,
        stage: DGStage,
        topology: list[list[int]],
        plain: bool,
        recorder: Recorder | None = None,
        sampling: GateSampling | None = None,
    ) -> None:
        self.stage, self.topology, self.plain = stage, topology, plain
        self.recorder, self.sampling = recorder, sampling
        self.trains = plain and torch.is_grad_enabled()
        self.checks = plain
        nodes = len(topology)
        self.weights: list[dict[int, Tensor]] = [{}] * nodes  # of every node: (batch,) of its edges, by target
        self.carried: list[dict[int, Tensor]] = [{}] * nodes  # ... and what they carry
        self.into: Tensor | None = None  # weights of the edges into the last node that was read
        self.pooled: list[Tensor | None] = [None] * nodes  # of every node, for gates
        self.passed: Tensor | None = None  # what the last node read; what it puts out where its gate is closed
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
        z = self.sum(carried, weights)
        self.passed = z if source is None else None
        return z

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
            return self.pass_on(node, super().apply(node, block, first))
        with recomputing() as self.recipes:
            feature = self.pass_on(node, super().apply(node, block, first))
        self.recipes = None
        return feature

    def pass_on(self, node: int, feature: Tensor | None) -> Tensor | None:
        """Put what a node read in place of its block's feature, for the images for which its gate is closed."""
        if feature is None or node not in self.stage.gated_nodes:
            return feature
        drawn, runs = self.draw_gate(node)
        if self.passed is None:  # the block read the stage's input; past it leads node 0's feature
            self.passed = self.read(node)
        assert self.passed is not None
        return self.mix(node, feature, self.passed, drawn, runs)

    def mix(self, node: int, feature: Tensor, z: Tensor, drawn: Tensor, runs: Tensor) -> Tensor:
        """As :func:`dg_timm.graph.gate.pass_on`."""
        if self.plain:
            self.check_shape(node, feature)
        if self.trains:
            return autograd.pass_on(feature, z, drawn, runs)
        if self.plain:
            return operators.pass_on(feature, z, runs)
        return pass_on(feature, z, drawn, runs)

    def draw_gate(self, node: int) -> tuple[Tensor, Tensor]:
        """Decide for which images a node runs, by the pooled vectors of its sources.

        Returns:
            (batch, 1), 1 and 0 with the gradient of a sigmoid, and the same as bool.
        """
        own: Gate = getattr(self.stage, f"gate{node}")
        assert self.into is not None
        pooled = [pool for pool in [self.pooled[i] for i in self.topology[node]] if pool is not None]
        logit = own(pool_inputs(pooled, self.into), None if self.sampling is None else self.sampling.budgets)
        if self.sampling is not None and self.sampling.noise is not None:
            logit = logit + self.sampling.noise[self.stage][node - 1, :, None]
        runs = is_open(logit)
        drawn = runs.to(logit.dtype)
        if edges.learns():
            drawn = edges.straight_through(torch.sigmoid(logit), drawn)
        if self.sampling is not None:
            self.sampling.drawn.setdefault(self.stage, {})[node] = drawn * edges.has_open_input(self.into)
        if self.recorder is not None:
            self.recorder.keep_gate(self.stage, node, runs | ~edges.has_open_input(self.into))
        return drawn, runs

    def finish(self, node: int, feature: Tensor) -> None:
        """As in :class:`Executor`."""
        if self.plain:
            self.check_shape(node, feature)
        router: Router = getattr(self.stage, f"router{node}")
        if self.trains:
            feature, pooled = autograd.pool(feature)
        else:
            pooled = operators.channel_means(feature) if self.plain else edges.global_average_pool(feature)
        self.pooled[node] = pooled
        if node == 0:  # nothing enters it; a block 1 that is computed again finds what the last node read
            self.into = None
        row = router(pooled) if self.into is None else router(pooled, edges.has_open_input(self.into))
        if self.recorder is not None:
            self.recorder.keep(self.stage, node, router, pooled, row)
        carried = autograd.split_to_edges(feature, row) if self.trains else [feature] * len(router.targets)
        self.carried[node] = dict(zip(router.targets, carried, strict=True))
        # tools that trace symbolically can index a row, and not unpack it
        columns = row.unbind(1) if self.plain else [row[:, k] for k in range(len(router.targets))]
        self.weights[node] = dict(zip(router.targets, columns, strict=True))


class Checkpointed(Dense):
    """Computes each node again in the backward pass, and keeps nothing of it but its feature."""

    def apply(self, node: int, block: nn.Module, first: FirstEdge | None = None) -> Tensor | None:
        """As in :class:`Executor`."""
        if first is not None and first.block_projects:
            reader = self.reader(first)
            return checkpoint(lambda x: self.pass_on(node, block(x, reader)), first.source, use_reentrant=False)
        sources = self.topology[node]
        if not sources:
            return None
        weights = self.weigh_inputs(node)
        past = carried = [self.carried[i][node] for i in sources]
        if first is not None:
            carried = list(autograd.split_to_edges(first.source, weights)) if self.trains else [first.source]
        gate = self.draw_gate(node) if node in self.stage.gated_nodes else None

        def run(weights: Tensor, *carried: Tensor) -> Tensor:
            z = self.sum(carried, weights)
            feature = block(z)
            if gate is None:
                return feature
            return self.mix(node, feature, z if first is None else self.sum(past, weights), *gate)

        return checkpoint(run, weights, *carried, use_reentrant=False)

    def reader(self, first: FirstEdge) -> Callable[[Tensor], FirstInputs | None]:
        """As in :class:`Executor`; the block calls it a second time when it is computed again."""
        into, read = self.into, super().reader(first)

        def read_again(projected: Tensor) -> "FirstInputs | None":
            self.into = into
            return read(projected)

        return read_again


def unused_parameters(stage: DGStage, topology: list[list[int]], fixed_threshold: bool) -> list[nn.Parameter]:
    """Parameters that take no part in a forward pass: of blocks left out, routers, gates, thresholds."""
    unused: list[nn.Parameter] = []
    for node in range(len(topology) - 1):
        router = getattr(stage, f"router{node}")
        if node in stage.gated_nodes:
            gate: Gate = getattr(stage, f"gate{node}")
            if not topology[node] or gate.effective_budget() is None:
                unused += gate.parameters()
        if node > 0 and not topology[node]:
            unused += [*getattr(stage, stage.block_names[node - 1]).parameters(), *router.parameters()]
        elif fixed_threshold or router.fixed_threshold is not None:
            unused.append(router.threshold)
    return unused
