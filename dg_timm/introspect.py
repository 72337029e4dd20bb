"""Look at a dynamic graph network and set its threshold."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from dg_timm.checkpoint import graph_stages, routers
from dg_timm.graph import adjacency_matrix

EXECUTIONS = ("dense", "sparse")


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
    executions = {stage: stage.is_sparse for stage in graph_stages(model).values()}
    try:
        for stage in executions:
            stage.is_sparse = False  # a removed node's router does not run there
        with record_adjacency(model) as recorded:
            model.eval()(images)
    finally:
        for module, training in modes.items():
            module.training = training
        for stage, is_sparse in executions.items():
            stage.is_sparse = is_sparse
    return recorded


@contextmanager
def record_adjacency(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the adjacency of the last forward that runs inside the ``with`` block, at no cost of a second one."""
    stages = require_dynamic(model)
    recorded: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}

    def hook(stage: str, is_last: bool):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, args: tuple[Tensor, ...], row: Tensor) -> None:
            rows.setdefault(stage, []).append(row.detach())
            if is_last:
                recorded[stage] = adjacency_matrix(rows.pop(stage))

        return record

    handles = []
    for name, stage in stages.items():
        own = list(routers(stage).values())
        handles += [router.register_forward_hook(hook(name, router is own[-1])) for router in own]
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


def set_execution(model: nn.Module, execution: str) -> None:
    """Choose how a model runs: the result is the same, to rounding.

    Args:
        execution: ``dense`` (the default): every edge is computed and multiplied; it trains, exports and compiles.
            ``sparse``: for evaluation; image by image, closed edges are not read and removed nodes are not run.

    Raises:
        ValueError: for another name, or if the model is static. The model is then left as it was.
    """
    stages = require_dynamic(model)
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
    for stage in stages.values():
        stage.is_sparse = execution == "sparse"  # type: ignore[assignment]


def require_dynamic(model: nn.Module) -> dict[str, nn.Module]:
    """The graphs of a model by name; ValueError if it has none."""
    stages = graph_stages(model)
    if not stages:
        raise ValueError(f"{type(model).__name__} is a static network; convert it with dg_timm.dynamize(model)")
    return dict(stages)
