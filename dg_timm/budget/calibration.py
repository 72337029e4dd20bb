"""Towards a compute budget: costs that can be learned from, a start from which blocks can be skipped, thresholds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from dg_timm.analysis.counting import Costs, count_costs
from dg_timm.analysis.recorder import adjacency
from dg_timm.execution.settings import set_threshold
from dg_timm.graph.stage import routers

ASLEEP = -4.0  # logit of an edge that could carry weight 1, and weighs 2 * sigmoid(-4) = 0.036


@dataclass(frozen=True)
class Operating:
    """What one threshold for all nodes does over a data set: mean cost of an image, and how it differs between them."""

    threshold: float
    cost: float
    spread: float  # standard deviation over images; 0 where every image takes the same path


def threshold_curve(model: nn.Module, batches: Iterable[Tensor], thresholds: Sequence[float]) -> list[Operating]:
    """The mean cost at each threshold; the model's own setting is kept.

    Args:
        batches: of images, (batch, channels, height, width); read once for each threshold, so no generator.

    Raises:
        ValueError: if there is no image, a threshold is no number of at least 0, or the model is static.
    """
    fixed = {router: router.fixed_threshold for router in routers(model).values()}
    counted: Optional[Costs] = None  # of the first image's size
    try:
        found = []
        for threshold in thresholds:
            set_threshold(model, threshold)
            costs = []
            for images in batches:
                counted = counted or count_costs(model, (images.shape[1], images.shape[2], images.shape[3]))
                alphas = adjacency(model, images)
                costs.append(counted.relative({name: (alpha != 0).double() for name, alpha in alphas.items()}))
            if not costs or not sum(map(len, costs)):
                raise ValueError("no images: give batches that can be read more than once")
            every = torch.cat(costs)
            found.append(Operating(float(threshold), every.mean().item(), every.std(unbiased=False).item()))
        return found
    finally:
        for router, before in fixed.items():
            router.fixed_threshold = before


def calibrate(
    model: nn.Module, batches: Iterable[Tensor], target_cost: float, *, highest: float = 2.0, steps: int = 16
) -> Operating:
    """Set the lowest threshold at which images cost ``target_cost`` on average, or less: one network, many budgets.

    Found by bisection, as fewer edges are open the higher the threshold is; what closes is what weighs least.

    Args:
        batches: as for :func:`threshold_curve`.
        target_cost: relative to the static network.
        highest: threshold to look at; no edge of an identity conversion weighs more than 2.
        steps: halvings of the interval.

    Raises:
        ValueError: if even ``highest`` costs more; the model is then left as it was.
    """
    if not target_cost > 0:
        raise ValueError(f"target_cost must be above 0, got {target_cost}")
    (best,) = threshold_curve(model, batches, [highest])
    if best.cost > target_cost:
        raise ValueError(
            f"no threshold up to {highest:g} brings the mean cost to {target_cost:g}: with every edge closed that can "
            f"be, it is {best.cost:.3f} (what always runs: stem, projections, head)"
        )
    low, high = 0.0, highest
    for _ in range(steps):
        (tried,) = threshold_curve(model, batches, [(low + high) / 2])
        if tried.cost <= target_cost:
            best, high = tried, tried.threshold
        else:
            low = tried.threshold
    set_threshold(model, best.threshold)
    return best
