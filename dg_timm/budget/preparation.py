"""Prepare a network to learn which edges to close."""

import torch
from torch import nn

from dg_timm._errors import BadValue
from dg_timm.conversion.state_dict import is_identity
from dg_timm.graph.stage import require_dynamic, routers

DORMANT_LOGIT = -4.0  # logit of an edge that could carry weight 1, and weighs 2 * sigmoid(-4) = 0.036


@torch.no_grad()
def raise_thresholds(model: nn.Module) -> None:
    """Lift thresholds to where edges can close: half of the smallest weight in a fresh stage. Higher ones stay.

    The edges of a fresh node weigh 1 / in-degree.
    """
    for stage in require_dynamic(model).values():
        lowest = 0.5 / max(len(sources) for sources in stage.edges)
        for router in routers(stage).values():
            router.threshold.clamp_(min=lowest)


@torch.no_grad()
def make_skippable(model: nn.Module, threshold: float = 0.1) -> None:
    """Let an identity conversion, still bit for bit the static network, skip a run of blocks by one router's decision.

    From the plain identity, to skip a block, the edges into it must close, and one past it must grow from scale 0 to
    full weight, at once. Here every edge that passes a block has the scale at which it weighs 1 when its logit is 0,
    and a logit so low that the threshold closes it.

    Args:
        model: an identity conversion.
        threshold: of all nodes, above 0.036 (an edge that is asleep) and below 1 (the chain).

    Raises:
        BadValue: if the model is no identity conversion, or the threshold is out of range; it is then left as it was.
    """
    require_dynamic(model)
    if not is_identity(model):
        raise BadValue("only an identity conversion can be made skippable: convert a static network first")
    if not 2 * torch.tensor(DORMANT_LOGIT).sigmoid().item() < threshold < 1:
        raise BadValue(f"threshold must lie between 0.036 and 1, got {threshold}")
    for router in routers(model).values():
        assert router.scale is not None
        router.scale.fill_(2.0)
        (router.fc.bias if hasattr(router, "fc") else router.logits)[1:] = DORMANT_LOGIT
        router.threshold.fill_(threshold)
