"""Sparse execution of a stage: a closed edge is not read, and a removed node is not run, image by image (paper 3.4).

The result is that of the dense execution, to rounding. Only images that use a node pass through its block, as a smaller
batch; nothing is padded to the densest image. Evaluation only: the wiring is read back from the routers, so there is
nothing to differentiate, trace or export.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dg_timm import aggregation, map_memory
from dg_timm.router import Router


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


Edges = list[list[tuple[int, float]]]  # of an image: (source node, weight) of its open edges into one node


class Feature:
    """Maps of one node, of the images that ran it.

    Attributes:
        maps: (images that ran, channels, height, width).
        place: of every image of the batch its index in ``maps``; -1 where the node was removed.
        rows: of every image in ``maps`` the weights of the edges that leave the node, by target.
        address, step: of the first image's map in memory, and from one to the next, in bytes.
    """

    def __init__(self, maps: Tensor, place: list[int], rows: list[list[float]]) -> None:
        self.maps, self.place, self.rows = maps, place, rows
        self.address, self.step = maps.data_ptr(), maps.stride(0) * maps.element_size()


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
    everyone = list(range(len(x)))
    x, node0 = aggregation.alike([x], x)[0], aggregation.alike([node0], node0)[0]
    nodes = [Feature(node0, everyone, rows_of(routers[0], node0))]
    for target, block in enumerate(blocks, start=1):
        edges = open_edges(nodes, target, len(x))
        images = [b for b in everyone if edges[b]]
        if not images:
            nodes.append(Feature(node0[:0], [-1] * len(x), []))
            continue
        first = target == 1 and reads_input
        z = combine([Feature(x, everyone, [])] if first else nodes, edges, images)
        out = block(z, combine(nodes, edges, images)) if target == 1 and takes_shortcut else block(z)
        place = [-1] * len(x)
        for k, b in enumerate(images):
            place[b] = k
        out = aggregation.alike([out], node0)[0]
        nodes.append(Feature(out, place, rows_of(routers[target], out)))
    return combine(nodes, open_edges(nodes, len(blocks) + 1, len(x)), everyone)


def rows_of(router: Callable[[Tensor], Tensor], maps: Tensor) -> list[list[float]]:
    """Weights of the edges that leave a node, of every image; by one call where the router is the plain one."""
    means = aggregation.pooled(maps)
    kernels = aggregation.kernels_for(means) if means.device.type == "cpu" else None
    if kernels is None or not _is_plain(router, means.dtype):
        rows: list[list[float]] = router(means).tolist()
        return rows
    assert isinstance(router, Router)
    fixed = router.fixed_threshold
    threshold = router.threshold.item() if fixed is None else fixed
    found: list[list[float]] = kernels.route(
        means.contiguous(), router.fc.weight, router.fc.bias, router.scale, threshold
    )
    if len(router.targets) == router.out_degree:
        return found
    places = [target - router.node - 1 for target in router.targets]
    return [[row[places.index(k)] if k in places else 0.0 for k in range(router.out_degree)] for row in found]


def _is_plain(router: Any, dtype: torch.dtype) -> bool:
    """Whether nothing but its parameters decides what a router gives."""
    return (
        type(router) is Router
        and router.is_instance_aware
        and dtype in (torch.float32, torch.float64)  # others round between the steps
        and router.fc.weight.dtype == dtype
        and router.fc.weight.is_contiguous()
        and not (router._forward_hooks or router._forward_pre_hooks or router.fc._forward_hooks)
    )


def open_edges(nodes: Sequence[Feature], target: int, batch: int) -> Edges:
    """Of every image the open edges into a node."""
    edges: Edges = [[] for _ in range(batch)]
    for source, node in enumerate(nodes):
        for image, k in enumerate(node.place):
            weight = node.rows[k][target - 1 - source] if k >= 0 else 0.0
            if weight != 0.0:
                edges[image].append((source, weight))
    return edges


def combine(nodes: Sequence[Feature], edges: Edges, images: Sequence[int]) -> Tensor:
    """Eq. 3 for some images: (len(images), C, H, W); zeros for one without an open edge."""
    z = map_memory.empty_like(nodes[0].maps, len(images))
    kernels = aggregation.kernels_for(z) if z.device.type == "cpu" else None
    if kernels is not None:
        kernels.gather_images(
            z,
            [
                [(nodes[s].address + nodes[s].place[image] * nodes[s].step, weight) for s, weight in edges[image]]
                for image in images
            ],
        )
    else:
        (by_image if z.device.type == "cpu" else by_source)(z, nodes, edges, images)
    return z


def by_image(z: Tensor, nodes: Sequence[Feature], edges: Edges, images: Sequence[int]) -> None:
    """One image after another: its sum stays in the cache while its sources are read, without a copy."""
    for out, image in zip(z.unbind(0), images, strict=True):
        out.zero_()
        for source, weight in edges[image]:
            out.add_(nodes[source].maps[nodes[source].place[image]], alpha=weight)


def by_source(z: Tensor, nodes: Sequence[Feature], edges: Edges, images: Sequence[int]) -> None:
    """One source after another, in few large steps: for devices where every step costs a launch."""
    z.zero_()
    for source, node in enumerate(nodes):
        read = [
            (k, node.place[image], weight)
            for k, image in enumerate(images)
            for origin, weight in edges[image]
            if origin == source
        ]
        if read:
            to, place, weights = zip(*read, strict=True)
            maps = node.maps.index_select(0, torch.tensor(place, device=z.device))
            scaled = maps * torch.tensor(weights, dtype=z.dtype, device=z.device).view(-1, 1, 1, 1)
            z.index_add_(0, torch.tensor(to, device=z.device), scaled)
