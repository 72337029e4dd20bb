"""What ``--target-cost`` means for a training: the price on cost, evaluation at every target, and the last word."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from dg_timm._errors import BadValue
from dg_timm.analysis.counting import Size
from dg_timm.budget.choice import BudgetChoice
from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.graph.context import requesting
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import graph_stages
from dg_timm.training.loop.objective import CostTarget, Losses
from dg_timm.training.loop.report import Metric, Row

COST_TOLERANCE = 0.01  # above its target a cost counts as reached


class Aim(NamedTuple):
    """What a training aims at.

    Attributes:
        targets: lowest and highest mean cost that gates learn; equal for a single budget.
        cascade: mean cost of the cascade that is chosen at the end, or None for none.
    """

    targets: tuple[float, float]
    cascade: float | None = None

    @property
    def is_range(self) -> bool:
        """Whether there is more than one target."""
        return self.targets[0] != self.targets[1]


def with_cost_target(
    args: argparse.Namespace,
    objective: Callable[..., Losses],
    model: nn.Module,
    input_size: Size,
    updates: int,
    *,
    cascades: bool = False,
) -> tuple[CostTarget, Aim]:
    """Put a price on the cost of a network, besides the loss of its task.

    Args:
        args: options of a training, with ``--target-cost``.
        objective: of the task.
        model: whose blocks learn to be skipped.
        input_size: (channels, height, width) of its images, of which its cost is counted.
        updates: of the whole training.
        cascades: one target is the cost of a cascade.

    Raises:
        BadValue: if the network is static, or no target or range that it can reach is given.
    """
    expected = ExpectedCost(model, input_size)
    aim = _aim_of(args, expected.minimum, cascades)
    priced = CostTarget(
        objective,
        expected,
        targets=aim.targets,
        weight=args.cost_weight,
        ramp=round(args.cost_ramp * updates),
        noise=args.cost_noise,
        noise_until=round(args.cost_quiet * updates),
        seed=args.seed,
    )
    return priced, aim


def _aim_of(args: argparse.Namespace, minimum: float, cascades: bool) -> Aim:
    """Check one cost or a range; ``minimum`` is what the network costs if it skips all that it can.

    The first pass of a cascade aims half-way between: the second one needs the rest.
    """
    low, high = args.target_cost[0], args.target_cost[-1]
    if len(args.target_cost) > 2 or low > high:
        given = " ".join(f"{cost:g}" for cost in args.target_cost)
        raise BadValue(f"--target-cost takes one cost, or the lowest and the highest of a range, got {given}")
    if low <= minimum:
        raise BadValue(
            f"--target-cost {low:g} can't be reached: {args.model} costs {minimum:.3f} if every image skips every "
            "block (stem, projections and head always run); aim above that"
        )
    if cascades and len(args.target_cost) == 1 and low < 1:
        return Aim((round((minimum + low) / 2, 3), 1.0), low)
    return Aim((low, high))


def describe_gates(model: nn.Module, minimum: float) -> str:
    """Say how many blocks can be skipped, and what the network costs if all of them are."""
    blocks = sum(len(stage.block_names) for stage in graph_stages(model).values())
    return (
        f"{len(gates(model))} of {blocks} blocks have a gate (the others change the shape); with every gate closed an "
        f"image costs {minimum:.3f}"
    )


def value_of(metric: Metric, aim: Aim) -> Metric:
    """Make the figure that is to grow where a cost is aimed at: a network that is too dear is not the best.

    A point of the metric is worth a hundredth of the static network's cost.
    """
    title = f"{metric.title.removesuffix(' (%)')} (%) less 100 x (cost - target)"
    return Metric("value", title, pictured=(metric.name, metric.title), costs=tuple(sorted({*aim.targets})))


def evaluate_targets(aim: Aim, metric: Metric, evaluate: Callable[[], Row]) -> Row:
    """Evaluate at a target, or at both ends of a range, each at its own budget.

    Args:
        aim: of the training.
        metric: of the task; in percent.
        evaluate: gives the metric and ``cost`` among its figures.

    Returns:
        The figures, those of the lower end as ``NAME@TARGET``; and ``value``, the mean of the metric less what the cost
        is too high.
    """
    row: Row = {}
    values = []
    targets = sorted({*aim.targets}, reverse=True)
    for target in targets:
        asked = dict(sets_budget=True, budget=target) if len(targets) > 1 else {}
        with requesting(**asked):
            found = evaluate()
        values.append(float(found[metric.name]) - 100 * max(0.0, float(found["cost"]) - target))
        row |= {key if target == targets[0] else f"{key}@{target:g}": value for key, value in found.items()}
    return row | {"value": sum(values) / len(values)}


def conclude(aim: Aim | None, row: Row) -> str | None:
    """Say whether the costs that were aimed at were reached, given the row of the summary of the best epoch."""
    if aim is None:
        return None
    targets = sorted({*aim.targets}, reverse=True)
    column = f"{prefix_of(row)}_cost"
    reached = [float(row[column if at == targets[0] else f"{column}@{at:g}"]) for at in targets]
    return f"cost aimed at: {'; '.join(map(_judge, targets, reached))}"


def prefix_of(row: Row) -> str:
    """Say whose figures of a row are those of the network that was saved: ``ema``, its average, or ``eval``."""
    return "ema" if float(row.get("ema_value", -math.inf)) >= float(row["eval_value"]) else "eval"


def conclude_cascade(aim: Aim, choice: BudgetChoice, images: int) -> str:
    """Say what a cascade does over the images that it was chosen on."""
    return (
        f"cost aimed at: {_judge(aim.cascade or 1.0, choice.cost)}, by a cascade: {describe_cascade(choice)}; top-1 "
        f"{choice.top1:.2f} % of the {images} images that it was chosen on"
    )


def describe_cascade(choice: BudgetChoice) -> str:
    """Say over which budgets a cascade runs, and what it costs."""
    budgets = " and ".join(f"{budget:g}" for budget in choice.budgets)
    return f"budgets {budgets}, {choice.certainty} below {choice.threshold:.3g} runs again, cost {choice.cost:.3f}"


def _judge(target: float, reached: float) -> str:
    verdict = "reached" if reached <= target + COST_TOLERANCE else "NOT reached: train longer, or aim higher"
    return f"{target:g} (it costs {reached:.3f}) {verdict}"


def compiles_whole(args: argparse.Namespace) -> bool:
    """Whether ``--compile`` means the whole network; where a cost is learned, its blocks are compiled one by one."""
    return bool(args.compile and args.target_cost is None)


def compile_blocks(model: Any) -> None:
    """Compile every block in place; what a pass asks of the graph around them is read from Python, as it runs."""
    for stage in graph_stages(model).values():
        for name in stage.block_names:
            stage.get_submodule(name).compile(backend="inductor")
