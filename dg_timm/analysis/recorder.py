"""Record the adjacency of each image as the network runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dg_timm.graph import edges as graph
from dg_timm.graph.router import Router
from dg_timm.graph.stage import graph_stages, require_dynamic, routers


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


def majority_topology(model: nn.Module, batches: Iterable[Tensor], share: float = 0.5) -> dict[str, Tensor]:
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
