"""The cost of a forward pass, as something to learn from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm.analysis.counting import Costs, Size, count_costs
from dg_timm.execution.cost_gates import Gates
from dg_timm.graph.context import requesting
from dg_timm.graph.edges import adjacency_matrix, straight_through
from dg_timm.graph.router import Router
from dg_timm.graph.stage import require_dynamic


class ExpectedCost:
    """The cost of every image of a forward pass that trains, with a gradient for the gate of every block.

    Its value is exactly :func:`dg_timm.cost`, with the noise of the gates if there is any. Its gradient is that of
    the blocks' gates (:mod:`dg_timm.execution.cost_gates`): so the weights of edges learn to close and open nodes. What
    edges cost themselves, about a hundredth, is in the value only.

    Args:
        model: a dynamic graph network, in dense execution; not touched.
        input_size: (channels, height, width) of its images; by default that of its configuration.

    Raises:
        BadValue: if the model is static.
    """

    def __init__(self, model: nn.Module, input_size: Size | None = None) -> None:
        require_dynamic(model)
        self.model = model
        self.costs: Costs = count_costs(model, input_size)

    @contextmanager
    def recording(self, noise: float = 0.0, seed: int = 0) -> Iterator[Callable[[], Tensor]]:
        """Call what this gives after a forward pass of the model inside the ``with`` block: (batch,) relative costs.

        Only passes of this thread are seen.

        Args:
            noise: scale of the noise on the logarithm of |weight| / threshold by which a node runs or does not.
            seed: of that noise.

        Raises:
            BadValue: if the model is not in dense execution.
        """
        stages = {name: stage for name, stage in require_dynamic(self.model).items() if name in self.costs.stages}
        if any(stage.execution != "dense" for stage in stages.values()):
            raise BadValue("a cost is learned in dense execution: dg_timm.set_execution(model, 'dense') first")
        generator = torch.Generator().manual_seed(seed)
        gates = {name: Gates(noise, generator) for name in stages}
        with requesting(gates={stage: gates[name] for name, stage in stages.items()}):
            yield lambda: self._relative(gates)

    def _relative(self, gates: dict[str, Gates]) -> Tensor:
        """(batch,): the cost, given the gates {stage: ...} of a forward pass."""
        stages = require_dynamic(self.model)
        opened = {}
        for name, of_stage in gates.items():
            routers = [stages[name].get_submodule(f"router{node}") for node in range(len(of_stage.rows))]
            targets = [router.targets for router in routers if isinstance(router, Router)]
            opened[name] = (adjacency_matrix(of_stage.rows, targets) != 0).float()
        run = torch.zeros(())
        for name, stage in self.costs.stages.items():
            for own, gate in zip(stage.nodes, gates[name].gates, strict=True):
                run = run + own * gate[:, 0]
        return straight_through(run / self.costs.static_total, self.costs.relative(opened))
