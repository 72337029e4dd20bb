"""What sparse execution knows of a batch while its nodes run: weights of edges, features, and who skips what."""

from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from dg_timm import _compat
from dg_timm.execution import allocator, backends, operators
from dg_timm.execution.backends.cpu import CpuKernels, GateParameters, NativeState, RouterParameters
from dg_timm.graph.context import request
from dg_timm.graph.gate import Gate, is_open, pool_inputs, splice
from dg_timm.graph.router import Router


class State(Protocol):
    """Edge weights and features of a batch whose nodes run in order.

    ``like`` is the feature of node 0, and ``images`` are the selected ones.
    """

    like: Tensor

    @property
    def images(self) -> list[int]: ...

    def select_all(self) -> None:
        """Select all images."""

    def select(self, node: int) -> int:
        """Select the images with an open edge into a node; give their number. The next calls are about these."""

    def close_gates(self, node: int, gate: Gate, router: Router) -> int:
        """Leave out the images that skip a node, and turn its edges into edges past it; give the others' number."""

    def gather(self, node: int, source: Tensor | None) -> Tensor:
        """Give what enters a node (Eq. 3); ``source`` is what node 0's edge carries in place of its feature."""

    def finish(self, node: int, feature: Tensor, router: Router) -> None:
        """Take a node's feature, and weigh its edges."""


def start_state(feature: Tensor, nodes: int, gates: bool) -> State:
    """Start with node 0's feature: by native code where there is any for it."""
    kernels = backends.kernels_for(feature) if operators.uses_kernels() else None
    if isinstance(kernels, CpuKernels):
        return ByKernels(kernels, feature, nodes, gates)
    return ByTorch(feature, nodes, gates)


def skip_node(alpha: Tensor, pooled: Tensor, images: list[int], node: int, gate: Gate, router: Router) -> list[int]:
    """Ask a gate by calling it; write the edges past the node into ``alpha``, for the images that skip it.

    Args:
        alpha: (batch, nodes, nodes), of the nodes so far.
        pooled: (batch, nodes, channels), of the same.
        images: that have an open edge into the node.

    Returns:
        the images that run it.
    """
    device = pooled.device
    of = torch.tensor(images, device=device)
    weights = alpha[of.to(alpha.device), :node, node].to(pooled)
    z = pool_inputs(list(pooled[of, :node].unbind(1)), weights)
    runs = is_open(gate(z))[:, 0]
    kept = [image for image, run in zip(images, runs.tolist(), strict=True) if run]
    if len(kept) < len(images):
        skipping = of[~runs].to(alpha.device)
        targets = torch.tensor(router.targets, device=alpha.device)
        alpha[skipping[:, None], node, targets] = router(z[~runs]).to(alpha)
        skipped = torch.zeros(len(skipping), alpha.shape[1], dtype=torch.bool, device=alpha.device)
        skipped[:, node] = True
        alpha[skipping] = splice(alpha[skipping], skipped)
    return kept


class ByKernels:
    """Edge weights and addresses of features lie where native code reads them."""

    def __init__(self, kernels: CpuKernels, feature: Tensor, nodes: int, gates: bool) -> None:
        self.like = feature
        self.native: NativeState = kernels.sparse_state(feature, nodes, gates)
        self.select, self.select_all = self.native.select_images, self.native.select_all
        self.maps: list[Tensor] = []  # kept, as their addresses are

    @property
    def images(self) -> list[int]:
        """As in :class:`State`."""
        return self.native.images

    def close_gates(self, node: int, gate: Gate, router: Router) -> int:
        """As in :class:`State`."""
        dtype = self.like.dtype
        channels = self.like.shape[1]
        plain_gate, plain_router = gate_parameters(gate, dtype, channels), plain_parameters(router, dtype, channels)
        if plain_gate is not None and plain_router is not None:
            return self.native.close_gates(node, plain_gate, plain_router)
        assert self.native.pooled is not None
        self.native.images = skip_node(self.native.alpha, self.native.pooled, self.native.images, node, gate, router)
        return self.native.count

    def gather(self, node: int, source: Tensor | None) -> Tensor:
        """As in :class:`State`."""
        z = allocator.empty_like(self.like if source is None else source, self.native.count)
        self.native.gather_inputs(z, node, source)
        return z

    def finish(self, node: int, feature: Tensor, router: Router) -> None:
        """As in :class:`State`."""
        self.maps.append(feature)
        plain = plain_parameters(router, feature.dtype, feature.shape[1])
        self.native.finish_node(node, feature, plain)
        if plain is None:
            means = operators.channel_means(feature)
            row = router(means).to(self.native.alpha.dtype)
            images = torch.tensor(self.native.images, device="cpu")
            self.native.alpha[images[:, None], node, torch.tensor(router.targets, device="cpu")] = row
            if self.native.pooled is not None:
                self.native.pooled[images, node] = means


def plain_parameters(router: Router, dtype: torch.dtype, channels: int) -> RouterParameters | None:
    """What a router of features of so many channels computes with, if nothing else decides what it gives.

    Otherwise None: it has to be called.

    It has to be where its layer is replaced, hooked, wrapped, parametrized, pruned, quantized or offloaded. A stage
    asks at every node, so this reads the dictionaries of modules.
    """
    if type(router) is not Router or dtype not in (torch.float32, torch.float64):
        return None  # other types round between the steps
    fc, own = _compat.own_modules(router).get("fc"), _compat.own_parameters(router)
    if type(fc) is not nn.Linear or _compat.has_hooks(router) or _compat.has_hooks(fc):
        return None
    of_fc = _compat.own_parameters(fc)
    weight, bias, scale, threshold = of_fc.get("weight"), of_fc.get("bias"), own.get("scale"), own.get("threshold")
    if not (_is_plain(weight, dtype) and _is_plain(bias, dtype) and _is_plain(threshold, dtype)):
        return None
    degree = len(router.targets)
    if weight.shape != (degree, channels) or bias.shape != (degree,) or not weight.is_contiguous():
        return None  # calling it says what is wrong
    if (scale is None) == router.has_scale or (scale is not None and scale.shape != (degree,)):
        return None
    fixed = request().threshold
    fixed = router.fixed_threshold if fixed is None else fixed
    return RouterParameters(weight, bias, scale, threshold.item() if fixed is None else fixed, tuple(router.targets))


def _is_plain(tensor: nn.Parameter | None, dtype: torch.dtype) -> TypeGuard[nn.Parameter]:
    return type(tensor) is nn.Parameter and tensor.dtype == dtype and not tensor.is_meta


def gate_parameters(gate: Gate, dtype: torch.dtype, channels: int) -> GateParameters | None:
    """What a gate computes with, as :func:`plain_parameters`."""
    fc = _compat.own_modules(gate).get("fc")
    if type(gate) is not Gate or type(fc) is not nn.Linear or _compat.has_hooks(gate) or _compat.has_hooks(fc):
        return None
    of_fc = _compat.own_parameters(fc)
    weight, bias, shift = of_fc.get("weight"), of_fc.get("bias"), _compat.own_parameters(gate).get("shift")
    if not (_is_plain(weight, dtype) and _is_plain(bias, dtype) and _is_plain(shift, dtype)):
        return None
    budget = gate.effective_budget()
    if budget is None or weight.shape != (1, channels) or not weight.is_contiguous():
        return None
    return GateParameters(weight, bias.item() + shift.item() * (1 - budget))


class ByTorch:
    """By PyTorch's operations, on any device; edge weights are read back to the CPU."""

    def __init__(self, feature: Tensor, nodes: int, gates: bool) -> None:
        self.like = feature
        self.batch, self.nodes = len(feature), nodes
        self.pooled = feature.new_zeros(self.batch, nodes, feature.shape[1]) if gates else None
        self.alpha = torch.zeros(self.batch, nodes, nodes, dtype=torch.float64, device="cpu")
        self.maps: list[Tensor | None] = [None] * nodes
        self.place: list[dict[int, int]] = [{} for _ in range(nodes)]  # of an image, in a node's maps
        self.images = list(range(self.batch))

    def select_all(self) -> None:
        """As in :class:`State`."""
        self.images = list(range(self.batch))

    def select(self, node: int) -> int:
        """As in :class:`State`."""
        is_open = (self.alpha[:, :node, node] != 0).any(1)
        self.images = is_open.nonzero().flatten().tolist()
        return len(self.images)

    def finish(self, node: int, feature: Tensor, router: Router) -> None:
        """As in :class:`State`."""
        self.maps[node] = feature
        self.place[node] = {image: k for k, image in enumerate(self.images)}
        means = operators.channel_means(feature)
        row = router(means).to("cpu", torch.float64)
        images = torch.tensor(self.images, dtype=torch.long, device="cpu")
        self.alpha[images[:, None], node, torch.tensor(router.targets, device="cpu")] = row
        if self.pooled is not None:
            self.pooled[images.to(self.pooled.device), node] = means

    def close_gates(self, node: int, gate: Gate, router: Router) -> int:
        """As in :class:`State`."""
        assert self.pooled is not None
        self.images = skip_node(self.alpha, self.pooled, self.images, node, gate, router)
        return len(self.images)

    def gather(self, node: int, source: Tensor | None) -> Tensor:
        """As in :class:`State`."""
        maps, place = list(self.maps), list(self.place)
        if source is not None:
            maps[0], place[0] = source, {image: image for image in range(self.batch)}
        assert maps[0] is not None
        z = allocator.empty_like(maps[0], len(self.images)).zero_()
        add = _scatter_per_image if z.device.type == "cpu" else _scatter_per_source
        for i in range(node):
            weights = self.alpha[self.images, i, node].tolist()
            read = [(k, place[i][b], w) for k, (b, w) in enumerate(zip(self.images, weights, strict=True)) if w != 0]
            own = maps[i]
            if read and own is not None:
                add(z, own, read)
        return z


Read = list[tuple[int, int, float]]  # image of z, image of a source's maps, weight


def _scatter_per_image(z: Tensor, maps: Tensor, read: Read) -> None:
    for to, place, weight in read:
        z[to].add_(maps[place], alpha=weight)


def _scatter_per_source(z: Tensor, maps: Tensor, read: Read) -> None:
    """All images of a source at once: for devices where every step costs a launch."""
    to, place, weights = zip(*read, strict=True)
    scale = torch.tensor(weights, dtype=z.dtype, device=z.device).view(-1, 1, 1, 1)
    z.index_add_(
        0, torch.tensor(to, device=z.device), maps.index_select(0, torch.tensor(place, device=z.device)) * scale
    )
