"""Choose budgets for images like some: one for all, or a cascade that asks the network how sure it is."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm.budget.curve import Observed, check_budgets, observe_budget, require_gates
from dg_timm.execution.cascade import CERTAINTIES, set_cascade
from dg_timm.graph.gate import gates

_QUANTILES = 40  # thresholds that are tried for every pair of budgets


@dataclass(frozen=True)
class BudgetChoice:
    """A setting of a network with gates, and what it did over the images that it was chosen on.

    Attributes:
        budgets: of the gates; one for all images, or two of a cascade.
        threshold: of the certainty, below which an image goes on to the second budget; None without a cascade.
        certainty: as in :func:`dg_timm.set_cascade`; None without a cascade.
        cost: mean over the images, relative to the static network; that of both passes.
        top1: percent of the images.
    """

    budgets: tuple[float, ...]
    threshold: float | None
    certainty: str | None
    cost: float
    top1: float


def choose_cascade(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    budgets: Sequence[float],
    *,
    target_cost: float | None = None,
    max_drop: float | None = None,
) -> BudgetChoice:
    """Choose one budget or a cascade of two by what they do over some images, and set it.

    The images should be none that accuracy is reported for: what was chosen on them flatters itself.

    Args:
        model: a classifier with gates, in any execution.
        batches: (images, labels), read once for each budget.
        budgets: of the gates to choose from, 0..1.
        target_cost: choose the highest top-1 at this mean cost or less, relative to the static network.
        max_drop: choose the lowest cost that loses at most these points of top-1 against the highest of ``budgets``.

    Raises:
        BadValue: if the network has no gates, there is no image, not one of ``target_cost`` and ``max_drop`` is given,
            or no choice costs so little. The model is then left as it was.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18", gates=True, num_classes=10).eval()
    >>> batches = [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))]
    >>> dg_timm.choose_cascade(model, batches, [0.5, 1.0], max_drop=0.0).budgets  # every gate is open at both
    (0.5,)
    """
    require_gates(model)
    check_aim(target_cost, max_drop)
    observed = {budget: observe_budget(model, batches, budget) for budget in check_budgets(budgets)}
    choice = choose_among(observed, target_cost=target_cost, max_drop=max_drop)
    set_choice(model, choice)
    return choice


def choose_among(
    observed: Mapping[float, Observed],
    *,
    target_cost: float | None = None,
    max_drop: float | None = None,
    only_cascades: bool = False,
) -> BudgetChoice:
    """As :func:`choose_cascade`, from what was observed at each budget; ``only_cascades`` leaves single ones out."""
    aim = check_aim(target_cost, max_drop)
    if any(len(of_budget.right) < len(of_budget.costs) for of_budget in observed.values()):
        raise BadValue("images without labels: give (images, labels) to choose by accuracy")
    ascending = dict(sorted(observed.items()))
    choices = [*(() if only_cascades else _single(ascending)), *_cascades(ascending)]
    if target_cost is None:
        whole = _percent(ascending[max(ascending)].right)
        return min((c for c in choices if c.top1 >= whole - aim - 1e-9), key=lambda choice: choice.cost)
    within = [choice for choice in choices if choice.cost <= aim]
    if not within:
        least = min(choice.cost for choice in choices)
        raise BadValue(f"no budget costs {aim:g} or less; the lowest costs {least:.3f}")
    return max(within, key=lambda choice: (choice.top1, -choice.cost))


def outcome(choice: BudgetChoice, observed: Mapping[float, Observed]) -> Observed:
    """Give what a network does under a choice, from what was observed of the same images at each budget."""
    first = observed[choice.budgets[0]]
    if choice.threshold is None or choice.certainty is None:
        return first
    again = ~(CERTAINTIES[choice.certainty](first.logits) >= choice.threshold)
    return run_again(first, observed[choice.budgets[1]], again)


def run_again(first: Observed, second: Observed, again: Tensor) -> Observed:
    """Put together two passes of a cascade; ``again`` (images,) bool says who takes the second one."""
    return Observed(
        first.costs + (second.costs - first.shared) * again,
        torch.where(again[:, None], second.logits, first.logits),
        torch.where(again, second.right, first.right),
        torch.where(again, second.shared, first.shared),
    )


def check_aim(target_cost: float | None, max_drop: float | None) -> float:
    """Give the one of both that is a number; raise BadValue for none, two, or what is no number from 0 on."""
    if (target_cost is None) == (max_drop is None):
        raise BadValue("give either target_cost or max_drop")
    aim = target_cost if max_drop is None else max_drop
    if isinstance(aim, bool) or not isinstance(aim, (int, float, np.number)) or not 0 <= aim < math.inf:
        raise BadValue(
            f"{'max_drop' if target_cost is None else 'target_cost'} must be a number from 0 on, got {aim!r}"
        )
    return float(aim)


def set_choice(model: nn.Module, choice: BudgetChoice) -> None:
    """Put a choice in force."""
    if choice.threshold is not None and choice.certainty is not None:
        set_cascade(model, choice.budgets, choice.threshold, choice.certainty)
        return
    set_cascade(model, None)
    for gate in gates(model).values():
        gate.budget = choice.budgets[0]


def _single(observed: Mapping[float, Observed]) -> Iterator[BudgetChoice]:
    for budget, of_budget in observed.items():
        yield BudgetChoice((budget,), None, None, of_budget.costs.mean().item(), _percent(of_budget.right))


def _cascades(observed: Mapping[float, Observed]) -> Iterator[BudgetChoice]:
    for (low, first), (high, second) in itertools.combinations(observed.items(), 2):
        for name, certainty in CERTAINTIES.items() if first.logits.shape[1] > 1 else ():
            sure = certainty(first.logits)
            for threshold in sure.quantile(torch.linspace(0, 1, _QUANTILES + 1)[1:].to(sure)).unique().tolist():
                both = run_again(first, second, ~(sure >= threshold))
                yield BudgetChoice((low, high), threshold, name, both.costs.mean().item(), _percent(both.right))


def _percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()
