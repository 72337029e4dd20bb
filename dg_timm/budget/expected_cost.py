"""The cost of a forward pass, as something to learn from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor, nn

from dg_timm.analysis.counting import Costs, count_costs
from dg_timm.execution.gates import Gates
from dg_timm.graph import edges as graph
from dg_timm.graph.stage import graph_stages, require_dynamic


class ExpectedCost:
    """The cost of every image of a forward pass that trains, with a gradient for the gate of every block.

    Its value is exactly :func:`dg_timm.cost`, with the noise of the gates if there is any. Its gradient is that of
    the blocks' gates (:mod:`dg_timm.execution.gates`): so the weights of edges learn to close and open nodes. What edges cost
    themselves, about a hundredth, is in the value only.

    Args:
        model: a dynamic graph network, in dense execution.
        input_size: (channels, height, width) of its images; by default that of its configuration.

    Raises:
        ValueError: if the model is static.
    """

    def __init__(self, model: nn.Module, input_size: Optional[tuple[int, int, int]] = None) -> None:
        require_dynamic(model)
        self.model = model
        self.costs: Costs = count_costs(model, input_size)

    @contextmanager
    def recording(self, noise: float = 0.0, seed: int = 0) -> Iterator[Callable[[], Tensor]]:
        """Call what it gives after a forward pass of the model inside the ``with`` block: (batch,) relative costs.

        Args:
            noise: scale of the noise on the logarithm of |weight| / threshold by which a node runs or does not.
            seed: of that noise.
        """
        stages = graph_stages(self.model)
        if any(stage.execution != "dense" for stage in stages.values()):
            raise ValueError("a cost is learned in dense execution: dg_timm.set_execution(model, 'dense') first")
        generator = torch.Generator().manual_seed(seed)
        gates = {name: Gates(noise, generator) for name in stages}
        try:
            for name, stage in stages.items():
                stage.gates = gates[name]
            yield lambda: self.relative(gates)
        finally:
            for stage in stages.values():
                stage.gates = None

    def relative(self, gates: dict[str, Gates]) -> Tensor:
        """(batch,): the cost, given the gates {stage: ...} of a forward pass."""
        opened = {name: (graph.adjacency_matrix(gate.rows) != 0).float() for name, gate in gates.items()}
        run = torch.zeros(())
        for name, stage in self.costs.stages.items():
            for own, gate in zip(stage.nodes, gates[name].of_nodes, strict=True):
                run = run + own * gate[:, 0]
        return graph.straight_through(run / self.costs.static, self.costs.relative(opened))
