"""What a user sets on a model: its threshold, and how it runs."""

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

from dg_timm._errors import BadType, BadValue
from dg_timm.graph.stage import require_dynamic, routers
from dg_timm.graph.topology import useful_edges

EXECUTIONS = ("dense", "sparse", "fixed")


def set_threshold(model: nn.Module, threshold: float | None) -> None:
    """Use one threshold for every node, in place of the learned ones; None returns to those.

    An edge closes where ``|weight| < threshold``. The weights are not touched, and the setting is not saved with them.
    While it is in force, learned thresholds get no gradient.

    Raises:
        BadType: if it is not a number.
        BadValue: if it is negative, infinite or NaN, or the model is static. The model is then left as it was.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_cifar_resnet26.cifar10", pretrained=True)
    >>> dg_timm.set_threshold(model, 0.0)  # every edge is open
    >>> bool((dg_timm.cost(model, torch.zeros(1, 3, 32, 32)) > 1).all())
    True
    >>> dg_timm.set_threshold(model, None)  # the learned thresholds
    """
    require_dynamic(model)
    threshold = check_threshold(threshold)
    for router in routers(model).values():
        router.fixed_threshold = threshold


def check_threshold(threshold: float | None) -> float | None:
    """Give a threshold as a float, or raise BadType or BadValue."""
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.floating)):
        raise BadType(f"threshold must be a number or None, got {threshold!r}")
    if not math.isfinite(threshold) or threshold < 0:
        raise BadValue(f"threshold must be finite and at least 0, got {threshold}")
    return float(threshold)


def set_execution(model: nn.Module, execution: str, topology: Mapping[str, Tensor] | None = None) -> None:
    """Choose how a model runs. The choice is not saved with the weights.

    Args:
        model: a dynamic graph network.
        execution: ``dense`` (the default) computes and multiplies every edge; it trains, exports and compiles.
            ``sparse`` is for evaluation, with the same result to rounding: image by image, closed edges are not read
            and removed nodes are not run. ``fixed`` has one topology for every image: edges that are not in it, and
            blocks that lie on no way from input to output, are left out; it trains, exports and compiles. Edges in it
            keep the weight that their router gives for the image.
        topology: for ``fixed`` alone, {stage: (N, N) bool, [source, target]}, as from
            :func:`dg_timm.majority_topology`.

    Raises:
        BadValue: for another name, a topology that does not fit or does not reach a stage's output, or if the model is
            static. The model is then left as it was.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_cifar_resnet26.cifar10", pretrained=True).eval()
    >>> images = torch.zeros(2, 3, 32, 32)
    >>> expected = model(images)
    >>> dg_timm.set_execution(model, "sparse")
    >>> torch.allclose(model(images), expected, atol=1e-4)
    True
    """
    stages = require_dynamic(model)
    if execution not in EXECUTIONS:
        raise BadValue(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
    if (topology is None) == (execution == "fixed"):
        needs = "takes no topology"
        if topology is None:
            needs = "needs a topology, {stage: (N, N) bool}: see dg_timm.majority_topology"
        raise BadValue(f"{execution} execution {needs}")
    if topology is None:
        chosen = {name: stage.edges for name, stage in stages.items()}
    else:
        if not isinstance(topology, Mapping) or topology.keys() != stages.keys():
            given = ", ".join(map(str, topology)) if isinstance(topology, Mapping) else type(topology).__name__
            raise BadValue(f"a topology for the stages {', '.join(stages)} is needed, got one for {given}")
        chosen = {name: useful_edges(name, topology[name], stage.edges) for name, stage in stages.items()}
    for name, stage in stages.items():
        stage.execution, stage.topology = execution, chosen[name]
