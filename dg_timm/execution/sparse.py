"""Sparse execution of a stage: a closed edge is not read, and a removed node is not run, image by image (paper 3.4).

The result is that of the dense execution, to rounding. Only images that use a node pass through its block, as a smaller
batch; nothing is padded to the densest image. Evaluation only: the topology is read back from the routers, so there is
nothing to differentiate, trace or export.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dg_timm.execution import aggregation
from dg_timm.execution import allocator as map_memory
from dg_timm.execution.backends.cpu import Kernels, RouterParameters
from dg_timm.graph.router import Router


def is_transformed(x: Any) -> bool:
    """Whether a program is being recorded or transformed: what is read of an image now would hold for all."""
    mode = _get_current_dispatch_mode()
    if mode is not None:  # without one, nothing here needs these modules
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

        if isinstance(mode, (FakeTensorMode, ProxyTorchDispatchMode)):  # others only watch
            return True
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or type(x) not in (Tensor, nn.Parameter)  # fx proxies, fake tensors, subclasses
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class NoGradient(torch.autograd.Function):
    """The second argument; whoever differentiates it is told why that can't be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError("sparse execution has no gradients; dg_timm.set_execution(model, 'dense') for them")


def run(
    x: Tensor,
    node0: Tensor,
    blocks: Sequence[nn.Module],
    routers: Sequence[Callable[[Tensor], Tensor]],
    takes_shortcut: bool,
    reads_input: bool,
) -> Tensor:
    """Run the graph of a stage.

    Args:
        x: (batch, in_chs, H, W), what block 1 reads along edge (0, 1) if ``reads_input``.
        node0: (batch, C, H', W'), the feature of node 0.
        blocks: of nodes 1..B.
        routers: of nodes 0..B, which take pooled features.
        takes_shortcut: whether block 1 takes ``weight * node0`` as its shortcut.
        reads_input: whether node 0's feature is a projection, which block 1 does not read.

    Returns:
        (batch, C, H', W').
    """
    x, node0 = aggregation.alike([x], x)[0], aggregation.alike([node0], node0)[0]
    kernels = aggregation.kernels_for(node0) if node0.device.type == "cpu" else None
    graph = _ByTorch(node0, len(blocks) + 2) if kernels is None else _ByKernels(kernels, node0, len(blocks) + 2)
    graph.leave(0, node0, routers[0])
    for target, block in enumerate(blocks, start=1):
        if not graph.enter(target):
            continue
        refuse_batch_statistics(block)
        z = graph.read(target, x) if target == 1 and reads_input else graph.read(target)
        out = block(z, graph.read(target)) if target == 1 and takes_shortcut else block(z)
        graph.leave(target, aggregation.alike([out], node0)[0], routers[target])
    return graph.output()


def refuse_batch_statistics(module: nn.Module) -> None:
    """A norm that averages over the batch would see a part of it; RuntimeError if there is one.

    Every call of a stage looks for them, and ``modules()`` takes longer than a small block.
    """
    rest: list[Optional[nn.Module]] = [module]
    while rest:
        found = rest.pop()
        if isinstance(found, _NormBase):
            if found.training or found.running_mean is None:
                raise RuntimeError(
                    f"sparse execution runs a block for a part of the batch, and a {type(found).__name__} of this "
                    "stage would take its statistics: call model.eval(), or dg_timm.set_execution(model, 'dense')"
                )
        elif found is not None and found._modules:
            rest.extend(found._modules.values())


class _ByKernels:
    """The topology of a batch, where :class:`dg_timm.execution.backends.cpu.Graph` keeps and reads it."""

    def __init__(self, kernels: Kernels, node0: Tensor, nodes: int) -> None:
        self.like, self.batch, self.nodes = node0, len(node0), nodes
        self.graph = kernels.graph(node0, nodes)
        self.count = self.batch
        self.maps: list[Tensor] = []  # kept, as their addresses are

    def enter(self, target: int) -> int:
        """For how many images the block runs; the next calls are about these."""
        self.count = self.graph.enter(target)
        return self.count

    def read(self, target: int, instead: Optional[Tensor] = None) -> Tensor:
        """Eq. 3: what the block reads; ``instead``: what node 0's edge carries in place of its feature."""
        z = map_memory.empty_like(self.like if instead is None else instead, self.count)
        if instead is None:
            self.graph.read(z, self.count, target)
        else:
            self.graph.read_instead(z, self.count, target, instead)
        return z

    def leave(self, node: int, maps: Tensor, router: Callable[[Tensor], Tensor]) -> None:
        """The block has run, and its router weighs the edges that leave it."""
        self.maps.append(maps)
        plain = _parameters(router, maps.dtype)
        self.graph.leave(node, maps, self.count, plain)
        if plain is None:
            row = router(aggregation.pooled(maps)).to(self.graph.alpha.dtype)
            self.graph.alpha[self.graph.images[: self.count], node, node + 1 :] = row

    def output(self) -> Tensor:
        """What the last node gathers, for every image; zeros for one without an open edge."""
        z = map_memory.empty_like(self.like)
        self.graph.everyone()
        self.graph.read(z, self.batch, self.nodes - 1)
        return z


def _parameters(router: Any, dtype: torch.dtype) -> Optional[RouterParameters]:
    """What a router computes with, if that is all that decides what it gives.

    A stage asks at every node, so this reads the dictionaries of modules; attributes take five times as long.
    """
    if type(router) is not Router or not router.is_instance_aware or dtype not in (torch.float32, torch.float64):
        return None  # other types round between the steps
    fc, own = router._modules["fc"], router._parameters
    assert fc is not None
    weight, bias, threshold = fc._parameters.get("weight"), fc._parameters.get("bias"), own.get("threshold")
    if weight is None or bias is None or threshold is None:  # pruned, parametrised ...
        return None
    if (
        weight.dtype != dtype
        or not weight.is_contiguous()
        or router._forward_hooks
        or router._forward_pre_hooks
        or fc._forward_hooks
        or fc._forward_pre_hooks
    ):
        return None
    fixed = router.fixed_threshold
    return weight, bias, own["scale"], threshold.item() if fixed is None else fixed, tuple(router.targets)


class _ByTorch:
    """As :class:`_ByKernels`, by PyTorch's operations on any device; the topology is read back to the CPU."""

    def __init__(self, node0: Tensor, nodes: int) -> None:
        self.batch, self.nodes = len(node0), nodes
        self.alpha = torch.zeros(self.batch, nodes, nodes, dtype=torch.float64)
        self.maps: list[Optional[Tensor]] = [None] * nodes
        self.place: list[dict[int, int]] = [{} for _ in range(nodes)]  # of an image, in a node's maps
        self.images = list(range(self.batch))

    def enter(self, target: int) -> int:
        is_open = (self.alpha[:, :target, target] != 0).any(1)
        self.images = is_open.nonzero().flatten().tolist()
        return len(self.images)

    def leave(self, node: int, maps: Tensor, router: Callable[[Tensor], Tensor]) -> None:
        self.maps[node] = maps
        self.place[node] = {image: k for k, image in enumerate(self.images)}
        self.alpha[self.images, node, node + 1 :] = router(aggregation.pooled(maps)).to("cpu", torch.float64)

    def read(self, target: int, instead: Optional[Tensor] = None) -> Tensor:
        maps, place = list(self.maps), list(self.place)
        if instead is not None:
            maps[0], place[0] = instead, {image: image for image in range(self.batch)}
        assert maps[0] is not None
        z = map_memory.empty_like(maps[0], len(self.images)).zero_()
        add = _by_image if z.device.type == "cpu" else _by_source
        for source in range(target):
            weights = self.alpha[self.images, source, target].tolist()
            read = [
                (k, place[source][b], w) for k, (b, w) in enumerate(zip(self.images, weights, strict=True)) if w != 0
            ]
            own = maps[source]
            if read and own is not None:
                add(z, own, read)
        return z

    def output(self) -> Tensor:
        self.images = list(range(self.batch))
        return self.read(self.nodes - 1)


Read = list[tuple[int, int, float]]  # image of z, image of a source's maps, weight


def _by_image(z: Tensor, maps: Tensor, read: Read) -> None:
    for to, place, weight in read:
        z[to].add_(maps[place], alpha=weight)


def _by_source(z: Tensor, maps: Tensor, read: Read) -> None:
    """All images of a source at once: for devices where every step costs a launch."""
    to, place, weights = zip(*read, strict=True)
    scale = torch.tensor(weights, dtype=z.dtype, device=z.device).view(-1, 1, 1, 1)
    z.index_add_(
        0, torch.tensor(to, device=z.device), maps.index_select(0, torch.tensor(place, device=z.device)) * scale
    )
