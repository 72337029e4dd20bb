"""Thresholds for a compute budget: what each does over a data set, and the one that keeps to a budget."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm.analysis.counting import Costs, count_costs
from dg_timm.analysis.recorder import adjacency
from dg_timm.execution.settings import check_threshold, set_threshold
from dg_timm.graph.context import requesting
from dg_timm.graph.stage import require_dynamic


@dataclass(frozen=True)
class OperatingPoint:
    """What one threshold for all nodes does over a data set.

    Attributes:
        threshold: of every node.
        cost: mean over images, relative to the static network.
        spread: standard deviation over images; 0 where every image takes the same path.
    """

    threshold: float
    cost: float
    spread: float


def threshold_curve(
    model: nn.Module, batches: Iterable[Tensor], thresholds: Sequence[float], counted: Costs | None = None
) -> list[OperatingPoint]:
    """Measure the mean cost at each threshold; the model and its own setting are not touched.

    Args:
        model: a dynamic graph network.
        batches: of images, (batch, channels, height, width); read once for each threshold, so no generator.
        thresholds: each at least 0.
        counted: what the network multiplies, if that is known; by default it is counted at the first image's size.

    Raises:
        BadType: if a threshold is no number.
        BadValue: if there is no image, a threshold is negative or not finite, or the model is static.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18").eval()
    >>> curve = dg_timm.threshold_curve(model, [torch.randn(2, 3, 64, 64)], [0.0, 1.1])
    >>> curve[0].cost > curve[1].cost
    True
    """
    require_dynamic(model)
    found = []
    for threshold in [check_threshold(threshold) for threshold in thresholds]:
        costs = []
        with requesting(threshold=threshold):
            for images in batches:
                alphas = adjacency(model, images)  # refuses what are no images of this model
                counted = counted or count_costs(model, (images.shape[1], images.shape[2], images.shape[3]))
                costs.append(counted.relative({name: (alpha != 0).double() for name, alpha in alphas.items()}))
        if threshold is None or not costs or not sum(map(len, costs)):
            raise BadValue("no images: give batches that can be read more than once")
        every = torch.cat(costs)
        found.append(OperatingPoint(threshold, every.mean().item(), every.std(unbiased=False).item()))
    return found


def calibrate(
    model: nn.Module, batches: Iterable[Tensor], target_cost: float, *, highest: float = 2.0, steps: int = 16
) -> OperatingPoint:
    """Set the lowest threshold at which images cost ``target_cost`` on average, or less: one network, many budgets.

    Found by bisection, as fewer edges are open the higher the threshold is; what closes is what weighs least.

    Args:
        model: a dynamic graph network.
        batches: as for :func:`threshold_curve`.
        target_cost: relative to the static network.
        highest: threshold to look at; no edge of an identity conversion weighs more than 2.
        steps: halvings of the interval.

    Returns:
        What the threshold does over the images.

    Raises:
        BadValue: if even ``highest`` costs more; the model is then left as it was.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18").eval()
    >>> dg_timm.calibrate(model, [torch.randn(2, 3, 64, 64)], 0.9, steps=4).cost <= 0.9
    True
    """
    if not target_cost > 0:
        raise BadValue(f"target_cost must be above 0, got {target_cost}")
    (best,) = threshold_curve(model, batches, [highest])
    if best.cost > target_cost:
        raise BadValue(
            f"target cost {target_cost:g} is unreachable: the minimum, at threshold {highest:g}, is {best.cost:.3f} "
            "(stem, projections and head always run)"
        )
    first = next(iter(batches))
    counted = count_costs(model, (first.shape[1], first.shape[2], first.shape[3]))
    low, high = 0.0, highest
    for _ in range(steps):
        (tried,) = threshold_curve(model, batches, [(low + high) / 2], counted)
        if tried.cost <= target_cost:
            best, high = tried, tried.threshold
        else:
            low = tried.threshold
    set_threshold(model, best.threshold)
    return best
