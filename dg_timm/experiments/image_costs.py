"""What networks with gates do image by image: at each budget, in a cascade, and how cost follows difficulty.

A cascade is chosen on one half of the test images and judged on the other, both ways round, so that no figure is of
images that it was chosen on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm._modes import evaluating
from dg_timm.budget.choice import choose_among, outcome, run_again
from dg_timm.budget.curve import Observed, observe_budget
from dg_timm.execution.cascade import CERTAINTIES

Row = dict[str, Any]

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)  # of the softmax, before certainty is read from it
_AGAIN = 0.1  # share of the images that run again, when certainties are compared


@dataclass(frozen=True)
class Images:
    """The images that networks are observed on.

    Attributes:
        batches: of (images, labels).
        labels: (images,) int64, of all.
        difficulty: (images,), the static network's loss of each.
    """

    batches: Sequence[tuple[Tensor, Tensor]]
    labels: Tensor
    difficulty: Tensor

    def select(self, places: Tensor) -> "Images":
        """Labels and difficulty of some of the images."""
        return Images((), self.labels[places], self.difficulty[places])


@torch.inference_mode()
def weigh_images(static: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Images:
    """Say how hard images are: by the loss of a static network."""
    with evaluating(static):
        losses = [F.cross_entropy(static(images), labels, reduction="none") for images, labels in batches]
    return Images(batches, torch.cat([labels for _, labels in batches]), torch.cat(losses))


def observe_budgets(model: nn.Module, images: Images, budgets: Sequence[float]) -> dict[float, Observed]:
    """Run a network over all images at each budget."""
    return {budget: observe_budget(model, images.batches, budget) for budget in budgets}


def budget_rows(observed: Mapping[float, Observed], images: Images) -> list[Row]:
    """Make a row for each budget."""
    return [{"how": f"budget {budget:g}", **_figures(found, images)} for budget, found in observed.items()]


def cascade_rows(observed: Mapping[float, Observed], images: Images, targets: Sequence[float]) -> list[Row]:
    """Make a row for each target cost that can be kept to; on the images that it is judged on, it may cost more."""
    even, odd = (torch.arange(start, len(images.labels), 2) for start in (0, 1))
    rows = []
    for target in targets:
        try:
            of_odd = _judge(observed, target, chosen_on=even, judged_on=odd)
            of_even = _judge(observed, target, chosen_on=odd, judged_on=even)
        except BadValue:  # no budget costs so little
            continue
        both = Observed(*(torch.cat(parts) for parts in zip(of_odd, of_even, strict=True)))
        rows.append({"how": f"cascade {target:g}", **_figures(both, images.select(torch.cat([odd, even])))})
    return rows


def _judge(observed: Mapping[float, Observed], target: float, *, chosen_on: Tensor, judged_on: Tensor) -> Observed:
    choice = choose_among(_select(observed, chosen_on), target_cost=target)
    return outcome(choice, _select(observed, judged_on))


def _select(observed: Mapping[float, Observed], places: Tensor) -> dict[float, Observed]:
    return {budget: Observed(*(part[places] for part in found)) for budget, found in observed.items()}


def certainty_rows(observed: Mapping[float, Observed], images: Images) -> list[Row]:
    """Make a row for each certainty and temperature: the tenth of the images that is least sure runs again.

    The first pass is at the lowest budget and the second at the highest, so that all rows cost about the same.
    """
    first, second = observed[min(observed)], observed[max(observed)]
    rows = []
    for name, certainty in CERTAINTIES.items():
        for temperature in TEMPERATURES:
            order = certainty(first.logits / temperature).argsort(stable=True)
            again = torch.zeros(len(order), dtype=torch.bool)
            again[order[: round(_AGAIN * len(order))]] = True
            found = _figures(run_again(first, second, again), images)
            rows.append({"how": f"{name}, temperature {temperature:g}", **found})
    return rows


def _figures(found: Observed, images: Images) -> Row:
    """Sum up: percent, nats, costs relative to the static network, and Spearman's rank correlation."""
    costs = found.costs.double()
    varies = bool(costs.std() > 0)
    return {
        "cost": costs.mean().item(),
        "spread": costs.std(unbiased=False).item(),
        "top1": 100 * found.right.double().mean().item(),
        "loss": F.cross_entropy(found.logits.float(), images.labels).item(),
        "rank_correlation": float(stats.spearmanr(costs, images.difficulty).statistic) if varies else 0.0,
    }
