"""The plain network that gates found: blocks that few images run are left out for all, and no gate is asked."""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from dg_timm._errors import BadType, BadValue
from dg_timm.analysis.recorder import skipped_nodes
from dg_timm.execution.cascade import set_cascade
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import require_dynamic


def to_fixed(model: nn.Module, batches: Iterable[Tensor] | Tensor, share: float = 0.5) -> nn.Module:
    """Copy a network with gates into one without: a block that too few images run is left out, the others always run.

    The copy has no control flow, and trains, saves, exports and compiles as any dynamic network. It is relative to the
    static network without those blocks that its :func:`dg_timm.cost` counts. Fine-tune it for a few epochs: the blocks
    that stay have not met every image.

    Args:
        model: a dynamic graph network with gates; it is not touched. The budget in force counts.
        batches: of images, (batch, channels, height, width), as the model takes them; or one batch.
        share: of the images that have to run a block for it to stay, 0..1.

    Raises:
        BadType: if the share is no number.
        BadValue: if the network has no gates, there is no image, or the share is out of range.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18", gates=True)
    >>> plain = dg_timm.to_fixed(model, torch.randn(2, 3, 64, 64))
    >>> images = torch.randn(1, 3, 64, 64)
    >>> torch.equal(plain.eval()(images), model.eval()(images))
    True
    """
    rare = rarely_run(model, batches, share)
    plain = copy.deepcopy(model)
    leave_out(plain, rare)
    return plain


@torch.no_grad()
def rarely_run(model: nn.Module, batches: Iterable[Tensor] | Tensor, share: float = 0.5) -> dict[str, list[int]]:
    """Find the blocks that less than a share of the images run, by stage: nodes, from 1; see :func:`to_fixed`."""
    require_dynamic(model)
    if not gates(model):
        raise BadValue("this network has no gates: there is nothing to fix")
    if isinstance(share, bool) or not isinstance(share, (int, float, np.floating)):
        raise BadType(f"share must be a number, got {share!r}")
    if not 0 <= share <= 1:
        raise BadValue(f"share must lie between 0 and 1, got {share:g}")
    skipped: dict[str, Tensor] = {}
    images = 0
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        for name, of_stage in skipped_nodes(model, batch).items():
            skipped[name] = skipped.get(name, torch.zeros(())) + of_stage.double().sum(0).cpu()
        images += len(batch)
    if images == 0:
        raise BadValue("no images: give at least one batch (batch, channels, height, width)")
    chosen = {name: (1 - of_stage / images < share).nonzero().flatten().tolist() for name, of_stage in skipped.items()}
    return {name: nodes for name, nodes in chosen.items() if nodes}


def leave_out(model: nn.Module, skipped: dict[str, list[int]]) -> None:
    """Leave blocks out of a dynamic network, in place, and drop its gates.

    Args:
        model: a dynamic graph network.
        skipped: {stage: nodes, from 1}.

    Raises:
        BadValue: if the model is static, or has no such stage or node. The model is then left as it was.
    """
    stages = require_dynamic(model)
    for name, nodes in skipped.items():
        if name not in stages:
            raise BadValue(f"there is no stage '{name}'; there are {', '.join(stages)}")
        last = len(stages[name].block_names)
        if any(isinstance(node, bool) or not isinstance(node, int) or not 1 <= node <= last for node in nodes):
            raise BadValue(f"nodes of '{name}' that can be left out are 1 to {last}, got {nodes}")
    set_cascade(model, None)  # it has no budgets any more
    for name, stage in stages.items():
        stage.leave_out(skipped.get(name, []))
