"""One network, many budgets: what each budget of its gates costs, and the setting that a user asks for."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dg_timm._errors import BadType, BadValue
from dg_timm._hardware import describe_hardware
from dg_timm._modes import evaluating
from dg_timm.analysis.counting import count_costs, recorded_cost, shared_cost
from dg_timm.analysis.recorder import recording
from dg_timm.execution.cascade import set_cascade
from dg_timm.graph.context import requesting
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import require_dynamic


@dataclass(frozen=True)
class BudgetPoint:
    """What the gates of a network do over some images, at one budget.

    Attributes:
        budget: that the gates aim at (:attr:`dg_timm.graph.gate.Gate.budget`), 0..1.
        cost: mean over the images, relative to the static network.
        spread: standard deviation of the cost between images; 0 where all take the same path.
        top1: percent of the images; None without labels.
        milliseconds: median time of an image, in sparse execution and at batch 1; None where it was not measured.
        where: the machine on which it was.
    """

    budget: float
    cost: float
    spread: float
    top1: float | None = None
    milliseconds: float | None = None
    where: str | None = None


def budget_curve(model: nn.Module) -> list[BudgetPoint]:
    """Give the curve of a network, by ascending cost; empty if none was measured.

    Raises:
        BadValue: if the model is static.

    >>> import dg_timm, timm
    >>> dg_timm.budget_curve(timm.create_model("dg_resnet18", gates=True))
    []
    """
    stage = next(iter(require_dynamic(model).values()))
    return [BudgetPoint(**point) for point in stage.budgets]


def keep_curve(model: nn.Module, points: Sequence[BudgetPoint]) -> None:
    """Make a curve a network's own: :func:`set_budget` reads it, and it is saved in config.json.

    >>> import dg_timm, timm
    >>> model = timm.create_model("dg_resnet18", gates=True)
    >>> dg_timm.keep_curve(model, [dg_timm.BudgetPoint(0.5, 0.6, 0.05), dg_timm.BudgetPoint(1.0, 0.9, 0.1)])
    >>> dg_timm.set_budget(model, 0.75)
    """
    ascending = [asdict(point) for point in sorted(points, key=lambda point: point.cost)]
    for stage in require_dynamic(model).values():
        stage.budgets = ascending


@torch.no_grad()
def measure_budgets(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    budgets: Sequence[float],
    *,
    timed_images: int = 0,
) -> list[BudgetPoint]:
    """Measure what a network costs and predicts at each budget; it is not touched, but for its modes meanwhile.

    Give the result to :func:`keep_curve` for :func:`set_budget` to use.

    Args:
        model: a dynamic graph network with gates, in any execution.
        batches: (images, labels or None), read once for each budget.
        budgets: of the gates, 0..1.
        timed_images: of the first batch, on which the time of an image is measured here, in sparse execution at batch
            1; the budgets take turns. 0 measures no time.

    Raises:
        BadValue: if the network has no gates, there is no budget or no image, or a budget is out of range.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18", gates=True).eval()
    >>> (point,) = dg_timm.measure_budgets(model, [(torch.randn(2, 3, 64, 64), None)], [1.0])
    >>> point.spread, point.top1
    (0.0, None)
    """
    require_gates(model)
    budgets = check_budgets(budgets)
    points = [observe_budget(model, batches, budget).summarize(budget) for budget in budgets]
    return time_points(model, points, next(iter(batches))[0][:timed_images]) if timed_images else points


def check_budgets(budgets: Sequence[float]) -> list[float]:
    """Give budgets of gates as floats; raise BadValue if there is none, or one is no number from 0 to 1."""
    listed = list(budgets)
    is_number = [not isinstance(b, bool) and isinstance(b, (int, float, np.number)) and 0 <= b <= 1 for b in listed]
    if not listed or not all(is_number):
        raise BadValue(f"budgets must be numbers between 0 and 1, got {listed}")
    return [float(budget) for budget in listed]


class Observed(NamedTuple):
    """What a network does for some images at one budget.

    Attributes:
        costs: (images,), relative to the static network.
        logits: (images, classes).
        right: (images,) bool, whether the prediction is the label; empty without labels.
        shared: (images,), of the cost, what the next pass of a cascade need not run again.
    """

    costs: Tensor
    logits: Tensor
    right: Tensor
    shared: Tensor

    def summarize(self, budget: float) -> BudgetPoint:
        """Make the point of a curve."""
        top1 = 100 * self.right.double().mean().item() if len(self.right) else None
        return BudgetPoint(budget, self.costs.mean().item(), self.costs.std(unbiased=False).item(), top1)


@torch.no_grad()
def observe_budget(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]], budget: float) -> Observed:
    """Run a network with gates at a budget, in dense execution; raise BadValue if there is no image."""
    costs, shared, logits, right, counted = [], [], [], [torch.empty(0, dtype=torch.bool)], None
    with evaluating(model), requesting(execution="dense", sets_budget=True, budget=budget):
        for images, labels in batches:
            counted = counted or count_costs(model, (images.shape[1], images.shape[2], images.shape[3]))
            with recording(model) as recorder:
                logits.append(model(images).cpu())
            costs.append(recorded_cost(model, recorder, counted).cpu())
            shared.append(shared_cost(model, recorder, counted).cpu())
            if labels is not None:
                right.append(logits[-1].argmax(1) == labels.cpu())
    if not costs:
        raise BadValue("no images: give batches that can be read more than once")
    return Observed(torch.cat(costs), torch.cat(logits), torch.cat(right), torch.cat(shared))


@torch.no_grad()
def time_points(model: nn.Module, points: Sequence[BudgetPoint], images: Tensor) -> list[BudgetPoint]:
    """Add to points of a curve the median milliseconds of an image here; the budgets take turns."""
    budgets = [point.budget for point in points]
    seconds: list[list[float]] = [[] for _ in budgets]
    with evaluating(model):
        for image in (images[:1], *images.split(1)):  # the first one warms up
            for of_budget, budget in zip(seconds, budgets, strict=True):
                with requesting(execution="sparse", sets_budget=True, budget=budget):
                    start = time.perf_counter()
                    model(image)
                    of_budget.append(time.perf_counter() - start)
    return [
        replace(point, milliseconds=1000 * median(of_budget[1:]), where=describe_hardware())
        for point, of_budget in zip(points, seconds, strict=True)
    ]


def set_budget(model: nn.Module, cost: float | None = None, *, milliseconds: float | None = None) -> None:
    """Choose how much a network with gates may compute: one network, many budgets.

    The setting is not saved with the weights; a network that is loaded runs at the highest budget it was trained for.
    It ends a cascade.

    Args:
        model: a dynamic graph network with gates, trained for a range of budgets.
        cost: mean cost of an image, relative to the static network, within the measured curve. None opens every gate.
        milliseconds: mean time of an image at batch 1 in sparse execution, in place of a cost; on a machine on which
            the network was calibrated.

    Raises:
        BadType: if it is no number.
        BadValue: if the network has no gates or no curve, or the curve does not reach there, or both are given. The
            model is then left as it was.

    >>> import dg_timm, timm
    >>> model = timm.create_model("dg_resnet18", gates=True)
    >>> dg_timm.set_budget(model, None)  # every gate is open
    """
    own = require_gates(model)
    if cost is not None and milliseconds is not None:
        raise BadValue("give a cost or milliseconds, not both")
    budget: float | None = None
    if cost is not None:
        budget = _interpolate(_curve(model), _number(cost, "cost"), "cost")
    elif milliseconds is not None:
        here = [
            point for point in _curve(model) if point.milliseconds is not None and point.where == describe_hardware()
        ]
        if len(here) < 2:
            raise BadValue(
                "no time of this network was measured on this machine: measure it here, dg_timm.keep_curve(model, "
                "dg_timm.measure_budgets(model, batches, budgets, timed_images=64))"
            )
        budget = _interpolate(here, _number(milliseconds, "milliseconds"), "milliseconds")
    set_cascade(model, None)
    for gate in own:
        gate.budget = budget


def require_gates(model: nn.Module) -> list:
    """Give the gates of a network, or raise BadValue if it has none."""
    require_dynamic(model)
    found = list(gates(model).values())
    if not found:
        raise BadValue(
            "this network has no gates, and no budget to set: convert it with dg_timm.dynamize(model, gates=True) and "
            "train it with --target-cost"
        )
    return found


def _curve(model: nn.Module) -> list[BudgetPoint]:
    points = budget_curve(model)
    if not points:
        raise BadValue(
            "this network has no measured curve of budgets: train it for a range (--target-cost 0.6 1.0), or measure "
            "one, dg_timm.keep_curve(model, dg_timm.measure_budgets(model, batches, budgets))"
        )
    return points


def _number(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise BadType(f"{name} must be a number or None, got {value!r}")
    return float(value)


def _interpolate(points: Sequence[BudgetPoint], value: float, key: str) -> float:
    """Find the budget at which a curve has this cost or time, between its two nearest points."""
    ordered = sorted(points, key=lambda point: getattr(point, key))
    at = [getattr(point, key) for point in ordered]
    if not at[0] <= value <= at[-1]:
        raise BadValue(f"{key} {value:g} lies outside what this network was measured for, {at[0]:.4g} to {at[-1]:.4g}")
    for k in range(1, len(at)):
        if value <= at[k]:
            share = (value - at[k - 1]) / (at[k] - at[k - 1]) if at[k] > at[k - 1] else 1.0
            return ordered[k - 1].budget + share * (ordered[k].budget - ordered[k - 1].budget)
    return ordered[-1].budget
