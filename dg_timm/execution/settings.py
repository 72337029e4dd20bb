"""Look at a dynamic graph network and set its threshold."""

import math
from collections.abc import Mapping
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from dg_timm.graph.stage import require_dynamic, routers

EXECUTIONS = ("dense", "sparse", "static")


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


def set_execution(model: nn.Module, execution: str, topology: Optional[Mapping[str, Tensor]] = None) -> None:
    """Choose how a model runs. The choice is not saved with the weights.

    Args:
        execution: ``dense`` (the default): every edge is computed and multiplied; it trains, exports and compiles.
            ``sparse``: for evaluation, with the same result to rounding; image by image, closed edges are not read and
            removed nodes are not run. ``static``: a fixed topology for every image: the edges that are not in it, and the
            blocks that none of its edges leads through to the output, are left out of the network; it trains, exports
            and compiles. Edges in it keep the weight that their router gives for the image.
        topology: for ``static`` alone, {stage: (N, N) bool, [source, target]}, as from :func:`majority_topology`.

    Raises:
        ValueError: for another name, a topology that does not fit or does not reach a stage's output, or if the model is
            static. The model is then left as it was.
    """
    stages = require_dynamic(model)
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
    if (topology is None) == (execution == "static"):
        needs = (
            "needs a topology, {stage: (N, N) bool}: see dg_timm.majority_topology"
            if topology is None
            else "takes no topology"
        )
        raise ValueError(f"{execution} execution {needs}")
    if topology is None:
        sources = {name: stage.edges for name, stage in stages.items()}
    else:
        if not isinstance(topology, Mapping) or topology.keys() != stages.keys():
            given = ", ".join(map(str, topology)) if isinstance(topology, Mapping) else type(topology).__name__
            raise ValueError(f"a topology for the stages {', '.join(stages)} is needed, got one for {given}")
        sources = {name: _sources(name, topology[name], stage.edges) for name, stage in stages.items()}
    for name, stage in stages.items():
        stage.execution, stage.topology = execution, sources[name]


def _sources(name: str, topology: Tensor, existing: list[list[int]]) -> list[list[int]]:
    """Of every node the sources of its edges, where both ends lie on a way from input to output."""
    nodes = len(existing)
    if not isinstance(topology, Tensor) or topology.dtype != torch.bool or topology.shape != (nodes, nodes):
        what = f"{tuple(topology.shape)} {topology.dtype}" if isinstance(topology, Tensor) else type(topology).__name__
        raise ValueError(f"the topology of '{name}' must be a ({nodes}, {nodes}) bool tensor, got {what}")
    edges = topology.cpu().triu(1)
    if not torch.equal(edges, topology.cpu()):
        raise ValueError(
            f"the topology of '{name}' must be strictly upper triangular: [source, target], source < target"
        )
    for source, target in edges.nonzero().tolist():
        if source not in existing[target]:
            raise ValueError(
                f"the topology of '{name}' has an edge ({source}, {target}), which the network does not have"
            )
    for node in range(1, nodes - 1):  # in order: what removes one node may remove the next
        edges[node] &= edges[:, node].any()
    for node in range(nodes - 2, 0, -1):
        edges[:, node] &= edges[node].any()
    if not edges[:, -1].any():
        raise ValueError(f"the topology of '{name}' has no way from its input to its output")
    return [edges[:, target].nonzero().flatten().tolist() for target in range(nodes)]
