"""Look at a dynamic graph network and set its threshold."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn

from dg_timm import graph
from dg_timm.checkpoint import graph_stages, routers
from dg_timm.router import Router
from dg_timm.stage import DGStage

EXECUTIONS = ("dense", "sparse", "static")


@torch.no_grad()
def adjacency(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Edge weights of every image, stage by stage.

    Args:
        model: a dynamic graph network; it is run in eval mode and left as it was.
        images: (batch, channels, height, width), as the model takes them.

    Returns:
        ``{stage name: alpha}`` in the order in which the stages run; alpha is (batch, N, N), [source, target], strictly
        upper triangular, for N - 2 blocks. A closed edge is exactly 0; so is every edge of a removed node.

    Raises:
        ValueError: if the model is static, or the images have the wrong rank or channels.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor (batch, channels, height, width), got {type(images).__name__}")
    modes = {module: module.training for module in model.modules()}
    try:
        with as_dense(model), record_adjacency(model) as recorded:
            model.eval()(images)
    finally:
        for module, training in modes.items():
            module.training = training
    return recorded


@contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """Every block and router runs inside the ``with`` block, whatever the execution."""
    chosen = {stage: (stage.execution, stage.wiring) for stage in graph_stages(model).values()}
    try:
        for stage in chosen:
            stage.execution, stage.wiring = "dense", stage.edges
        yield
    finally:
        for stage, (execution, wiring) in chosen.items():
            stage.execution, stage.wiring = execution, wiring


@contextmanager
def record_adjacency(
    model: nn.Module, row_of: Callable[[Router, Tensor, Tensor], Tensor] = lambda router, pooled, row: row.detach()
) -> Iterator[dict[str, Tensor]]:
    """Collect the adjacency of the last forward that runs inside the ``with`` block, at no cost of a second one.

    Args:
        row_of: (router, pooled feature, weights of the edges that leave its node) -> what to collect of them.
    """
    stages = require_dynamic(model)
    recorded: dict[str, Tensor] = {}
    if any(stage.execution != "dense" for stage in stages.values()):
        raise ValueError("the adjacency is recorded in dense execution: dg_timm.set_execution(model, 'dense') first")
    handles = []
    for name, stage in stages.items():
        rows: list[Tensor] = []

        def begin(module: nn.Module, args: tuple[Tensor, ...], rows: list[Tensor] = rows) -> None:
            rows.clear()  # of a forward that was interrupted

        def keep(module: Any, args: tuple[Tensor, ...], row: Tensor, rows: list[Tensor] = rows) -> None:
            rows.append(row_of(module, args[0], row))

        def assemble(
            module: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name, rows: list[Tensor] = rows
        ) -> None:
            recorded[name] = graph.adjacency_matrix(rows)
            rows.clear()

        handles += [router.register_forward_hook(keep) for router in routers(stage).values()]
        handles += [stage.register_forward_pre_hook(begin), stage.register_forward_hook(assemble)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def set_threshold(model: nn.Module, threshold: Optional[float]) -> None:
    """Use one threshold for every node, in place of the learned ones; None returns to those.

    The weights are not touched, and the setting is not saved with them. An edge closes where ``|weight| < threshold``.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is negative, infinite or NaN, or the model is static. The model is then left as it was.
    """
    require_dynamic(model)
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.floating)):
            raise TypeError(f"threshold must be a number or None, got {threshold!r}")
        if not math.isfinite(threshold) or threshold < 0:
            raise ValueError(f"threshold must be finite and at least 0, got {threshold}")
        threshold = float(threshold)
    for router in routers(model).values():
        router.fixed_threshold = threshold


def set_execution(model: nn.Module, execution: str, wiring: Optional[Mapping[str, Tensor]] = None) -> None:
    """Choose how a model runs. The choice is not saved with the weights.

    Args:
        execution: ``dense`` (the default): every edge is computed and multiplied; it trains, exports and compiles.
            ``sparse``: for evaluation, with the same result to rounding; image by image, closed edges are not read and
            removed nodes are not run. ``static``: a fixed wiring for every image: the edges that are not in it, and the
            blocks that none of its edges leads through to the output, are left out of the network; it trains, exports
            and compiles. Edges in it keep the weight that their router gives for the image.
        wiring: for ``static`` alone, {stage: (N, N) bool, [source, target]}, as from :func:`fixed_wiring`.

    Raises:
        ValueError: for another name, a wiring that does not fit or does not reach a stage's output, or if the model is
            static. The model is then left as it was.
    """
    stages = require_dynamic(model)
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
    if (wiring is None) == (execution == "static"):
        needs = (
            "needs a wiring, {stage: (N, N) bool}: see dg_timm.fixed_wiring" if wiring is None else "takes no wiring"
        )
        raise ValueError(f"{execution} execution {needs}")
    if wiring is None:
        sources = {name: stage.edges for name, stage in stages.items()}
    else:
        if not isinstance(wiring, Mapping) or wiring.keys() != stages.keys():
            given = ", ".join(map(str, wiring)) if isinstance(wiring, Mapping) else type(wiring).__name__
            raise ValueError(f"a wiring for the stages {', '.join(stages)} is needed, got one for {given}")
        sources = {name: _sources(name, wiring[name], stage.edges) for name, stage in stages.items()}
    for name, stage in stages.items():
        stage.execution, stage.wiring = execution, sources[name]


def _sources(name: str, wiring: Tensor, existing: list[list[int]]) -> list[list[int]]:
    """Of every node the sources of its edges, where both ends lie on a way from input to output."""
    nodes = len(existing)
    if not isinstance(wiring, Tensor) or wiring.dtype != torch.bool or wiring.shape != (nodes, nodes):
        what = f"{tuple(wiring.shape)} {wiring.dtype}" if isinstance(wiring, Tensor) else type(wiring).__name__
        raise ValueError(f"the wiring of '{name}' must be a ({nodes}, {nodes}) bool tensor, got {what}")
    edges = wiring.cpu().triu(1)
    if not torch.equal(edges, wiring.cpu()):
        raise ValueError(f"the wiring of '{name}' must be strictly upper triangular: [source, target], source < target")
    for source, target in edges.nonzero().tolist():
        if source not in existing[target]:
            raise ValueError(
                f"the wiring of '{name}' has an edge ({source}, {target}), which the network does not have"
            )
    for node in range(1, nodes - 1):  # in order: what removes one node may remove the next
        edges[node] &= edges[:, node].any()
    for node in range(nodes - 2, 0, -1):
        edges[:, node] &= edges[node].any()
    if not edges[:, -1].any():
        raise ValueError(f"the wiring of '{name}' has no way from its input to its output")
    return [edges[:, target].nonzero().flatten().tolist() for target in range(nodes)]


def fixed_wiring(model: nn.Module, batches: Iterable[Tensor], share: float = 0.5) -> dict[str, Tensor]:
    """One wiring for all images: the edges that are open for at least a share of those of a data set.

    Args:
        batches: of images, (batch, channels, height, width), as the model takes them.
        share: from 0 to 1.

    Returns:
        {stage: (N, N) bool}, for ``set_execution(model, "static", wiring)``.

    Raises:
        ValueError: if there is no image, the share is not one, or the model is static.
    """
    require_dynamic(model)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"share must be a number from 0 to 1, got {share!r}")
    total, times_open = 0, dict[str, Tensor]()
    for images in batches:
        total += len(images)
        for name, alpha in adjacency(model, images).items():
            times_open[name] = times_open.get(name, 0) + (alpha != 0).sum(0)
    if total == 0:
        raise ValueError("no images: give at least one batch (batch, channels, height, width)")
    return {name: ((count >= share * total) & (count > 0)) for name, count in times_open.items()}


def require_dynamic(model: nn.Module) -> dict[str, DGStage]:
    """The graphs of a model by name; ValueError if it has none."""
    stages = graph_stages(model)
    if not stages:
        raise ValueError(f"{type(model).__name__} is a static network; convert it with dg_timm.dynamize(model)")
    return stages
