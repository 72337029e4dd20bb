"""The cost of a forward pass, as something to learn from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm.analysis.counting import Costs, Size, count_costs
from dg_timm.graph.context import GateSampling, requesting
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import DGStage, require_dynamic


class ExpectedCost:
    """The cost of every image of a forward pass that trains, with a gradient for the gate of every block.

    Its value counts blocks, with the noise of the gates if there is any, and takes every edge into a block that runs
    as read: :func:`dg_timm.cost` is at most this. What edges cost is about a hundredth.

    Args:
        model: a dynamic graph network with gates, in dense execution; not touched.
        input_size: (channels, height, width) of its images; by default that of its configuration.

    Raises:
        BadValue: if the model is static, or has no gates.
    """

    def __init__(self, model: nn.Module, input_size: Size | None = None) -> None:
        require_dynamic(model)
        if not gates(model):
            raise BadValue("a cost is learned by gates, and this network has none: convert it with gates=True")
        self.model = model
        self.costs: Costs = count_costs(model, input_size)
        self.always = float(self.costs.always_run)
        for name, stage in require_dynamic(model).items():
            if name in self.costs.stages:
                costs = self.costs.stages[name]
                self.always += float(costs.edges[:, -1].sum())
                self.always += sum(own for node, own in enumerate(costs.blocks, 1) if node not in stage.gated_nodes)

    @property
    def minimum(self) -> float:
        """The cost of an image for which every gate is closed, relative to the static network."""
        total = float(self.costs.always_run)
        for name, stage in require_dynamic(self.model).items():
            if name in self.costs.stages:
                costs, ungated = self.costs.stages[name], len(stage.block_names) - len(stage.gated_nodes)
                total += sum(costs.nodes[:ungated]) + float(costs.edges[0, 1] if ungated else 0)
                total += float(costs.edges[ungated, -1])
        return total / self.costs.static_total

    @contextmanager
    def recording(
        self, batch: int, *, noise: float = 0.0, seed: int = 0, budgets: Tensor | None = None
    ) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        """Call what this gives after a forward pass of the model inside the ``with`` block.

        Only passes of this thread are seen.

        Args:
            batch: number of images of the pass.
            noise: scale of the logistic noise on the gates' logits.
            seed: of that noise.
            budgets: (batch,), what each image's gates aim at (:attr:`dg_timm.graph.gate.Gate.budget`).

        Yields:
            A function that gives (batch,) relative costs, to learn from, and (batch,) shares of blocks that are
            skipped.

        Raises:
            BadValue: if the model is not in dense execution.
        """
        stages = {name: stage for name, stage in require_dynamic(self.model).items() if name in self.costs.stages}
        if any(stage.execution != "dense" for stage in stages.values()):
            raise BadValue("a cost is learned in dense execution: dg_timm.set_execution(model, 'dense') first")
        device = next(self.model.parameters()).device
        sampling = GateSampling(_logistic(list(stages.values()), batch, noise, seed, device) if noise else None)
        if budgets is not None:
            sampling.budgets = budgets[:, None].to(device, torch.float32)
        with requesting(gates=sampling):
            yield lambda: self._relative(stages, sampling)

    def _relative(self, stages: dict[str, DGStage], sampling: GateSampling) -> tuple[Tensor, Tensor]:
        macs = [
            self.costs.stages[name].blocks[node - 1] for name, stage in stages.items() for node in stage.gated_nodes
        ]
        drawn = torch.cat([sampling.drawn[stage][node] for stage in stages.values() for node in stage.gated_nodes], 1)
        run = drawn @ torch.tensor(macs, dtype=drawn.dtype).to(drawn.device, non_blocking=True)
        blocks = sum(len(stage.block_names) for stage in stages.values())
        return (self.always + run) / self.costs.static_total, (drawn.detach() == 0).float().sum(1) / blocks


def _logistic(
    stages: list[DGStage], batch: int, scale: float, seed: int, device: torch.device
) -> dict[DGStage, Tensor]:
    """Draw the difference of two Gumbel noises for every gate and image, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for stage in stages:
        uniform = torch.rand(len(stage.block_names), batch, generator=generator).clamp(1e-6, 1 - 1e-6)
        found[stage] = (uniform.logit() * scale).to(device, non_blocking=True)
    return found
