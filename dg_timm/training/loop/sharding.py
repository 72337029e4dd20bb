"""FSDP2: every process keeps a share of the parameters, gradients and optimizer states, and gathers what it runs.

A block is gathered when it runs, and freed after it. The processes have to run the same blocks in the same order.
Accelerate shards on accelerators alone; torch's own ``fully_shard`` does it on CPUs, too, and is what Accelerate calls.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dg_timm._errors import BadValue
from dg_timm.conversion.find import find_stages
from dg_timm.graph.stage import graph_stages

T = TypeVar("T")


def shard(network: nn.Module, device: torch.device) -> None:
    """Share a network out over all processes, in place: each block by itself, and the rest together.

    Args:
        network: dynamic or static. A static one whose blocks can't be told is shared out as one.
        device: of this process; the shares and all buffers go there.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    network.to(device)


def _blocks(network: nn.Module) -> list[nn.Module]:
    stages = list(graph_stages(network).values())
    if stages:
        return [stage.get_submodule(name) for stage in stages for name in (*stage.entry_names, *stage.block_names)]
    try:
        plans = find_stages(network)
    except BadValue:
        return []
    return [block for plan in plans for block in network.get_submodule(plan.name).children()]


def gather(state: Any) -> Any:
    """Put the tensors of a state dict together, on the CPU; every process has to call it."""
    if isinstance(state, Mapping):
        return {key: gather(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value) for value in state]
    if isinstance(state, DTensor):
        state = state.full_tensor()
    return state.detach().cpu().contiguous() if isinstance(state, Tensor) else state


def load(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a network, sharded or not; every process has to call it."""
    own = network.state_dict()
    network.load_state_dict({key: _share(value, own[key]) for key, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the gathered state of an optimizer into one over the same parameters, which are sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # in the order of their numbers
    shares = {
        number: {
            name: _share(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in of_parameter.items()
        }
        for number, of_parameter in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shares})


def _share(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


class Whole:
    """A network in one piece, made of a sharded one when it is asked for.

    Args:
        network: before it is sharded. Only its shapes and its buffers outside the state dict are kept.
    """

    def __init__(self, network: nn.Module) -> None:
        saved = network.state_dict()
        self._buffers = {name: b.clone() for name, b in network.named_buffers() if name not in saved}
        self._twin = copy.deepcopy(network).to("meta")

    def of(self, sharded: nn.Module, wanted: bool) -> nn.Module | None:
        """Gather a network on the CPU where it is wanted; every process has to call it."""
        state = gather(sharded.state_dict())
        if not wanted:
            return None
        network = copy.deepcopy(self._twin).to_empty(device="cpu")
        network.load_state_dict(state)
        for name, buffer in self._buffers.items():
            network.get_buffer(name).copy_(buffer)
        return network.eval()


def in_step(
    batches: Iterator[T], fill: Callable[[], T], stop: Callable[[], bool], total: Callable[..., list[float]]
) -> Iterator[T]:
    """Yield the batches of this process, then empty ones until every process has had its last one, or is to stop.

    Args:
        batches: of this process.
        fill: makes a batch in which nothing counts.
        stop: whether this process is to stop.
        total: sums numbers over the processes.
    """
    while True:
        batch = next(batches, None)
        left, stopping = total(batch is not None, stop())
        if not left or stopping:
            return
        yield fill() if batch is None else batch
