"""What ``--target-cost`` means for a training: the price on cost, evaluation at every target, and the last word."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dg_timm._errors import BadValue
from dg_timm.analysis.counting import Size
from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.graph.context import requesting
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import graph_stages
from dg_timm.training.loop.objective import CostTarget, Losses
from dg_timm.training.loop.report import Metric, Row

COST_TOLERANCE = 0.01  # above its target a cost counts as reached


def with_cost_target(
    args: argparse.Namespace, objective: Callable[..., Losses], model: nn.Module, input_size: Size, updates: int
) -> CostTarget:
    """Put a price on the cost of a network, besides the loss of its task.

    Args:
        args: options of a training, with ``--target-cost``.
        objective: of the task.
        model: whose blocks learn to be skipped.
        input_size: (channels, height, width) of its images, of which its cost is counted.
        updates: of the whole training.

    Raises:
        BadValue: if the network is static, or no target or range that it can reach is given.
    """
    expected = ExpectedCost(model, input_size)
    return CostTarget(
        objective,
        expected,
        targets=_check_targets(args, expected.minimum),
        weight=args.cost_weight,
        ramp=round(args.cost_ramp * updates),
        noise=args.cost_noise,
        noise_until=round(args.cost_quiet * updates),
        seed=args.seed,
    )


def _check_targets(args: argparse.Namespace, minimum: float) -> tuple[float, float]:
    """Check one cost or a range; ``minimum`` is what the network costs if it skips all that it can."""
    low, high = args.target_cost[0], args.target_cost[-1]
    if len(args.target_cost) > 2 or low > high:
        given = " ".join(f"{cost:g}" for cost in args.target_cost)
        raise BadValue(f"--target-cost takes one cost, or the lowest and the highest of a range, got {given}")
    if low <= minimum:
        raise BadValue(
            f"--target-cost {low:g} can't be reached: {args.model} costs {minimum:.3f} if every image skips every "
            "block (stem, projections and head always run); aim above that"
        )
    return low, high


def describe_gates(model: nn.Module, minimum: float) -> str:
    """Say how many blocks can be skipped, and what the network costs if all of them are."""
    blocks = sum(len(stage.block_names) for stage in graph_stages(model).values())
    return (
        f"{len(gates(model))} of {blocks} blocks have a gate (the others change the shape); with every gate closed an "
        f"image costs {minimum:.3f}"
    )


def value_of(metric: Metric, target_cost: Sequence[float]) -> Metric:
    """Make the figure that is to grow where a cost is aimed at: a network that is too dear is not the best.

    A point of the metric is worth a hundredth of the static network's cost.
    """
    title = f"{metric.title.removesuffix(' (%)')} (%) less 100 x (cost - target)"
    return Metric("value", title, pictured=(metric.name, metric.title), costs=tuple(target_cost))


def evaluate_targets(target_cost: Sequence[float], metric: Metric, evaluate: Callable[[], Row]) -> Row:
    """Evaluate at a target, or at both ends of a range, each at its own budget.

    Args:
        target_cost: as the option has it.
        metric: of the task; in percent.
        evaluate: gives the metric and ``cost`` among its figures.

    Returns:
        The figures, those of the lower end as ``NAME@TARGET``; and ``value``, the mean of the metric less what the cost
        is too high.
    """
    row: Row = {}
    values = []
    targets = sorted(set(target_cost), reverse=True)
    for target in targets:
        asked = dict(sets_budget=True, budget=target) if len(targets) > 1 else {}
        with requesting(**asked):
            found = evaluate()
        values.append(float(found[metric.name]) - 100 * max(0.0, float(found["cost"]) - target))
        row |= {key if target == targets[0] else f"{key}@{target:g}": value for key, value in found.items()}
    return row | {"value": sum(values) / len(values)}


def conclude(target_cost: Sequence[float] | None, row: Row) -> str | None:
    """Say whether the costs that were aimed at were reached, given the row of the summary of the best epoch."""
    lines = []
    targets = sorted(set(target_cost or ()), reverse=True)
    for target in targets:
        reached = float(row["eval_cost" if target == targets[0] else f"eval_cost@{target:g}"])
        verdict = "reached" if reached <= target + COST_TOLERANCE else "NOT reached: train longer, or aim higher"
        lines.append(f"{target:g} (it costs {reached:.3f}) {verdict}")
    return f"cost aimed at: {'; '.join(lines)}" if lines else None


def compiles_whole(args: argparse.Namespace) -> bool:
    """Whether ``--compile`` means the whole network; where a cost is learned, its blocks are compiled one by one."""
    return bool(args.compile and args.target_cost is None)


def compile_blocks(model: Any) -> None:
    """Compile every block in place; what a pass asks of the graph around them is read from Python, as it runs."""
    for stage in graph_stages(model).values():
        for name in stage.block_names:
            stage.get_submodule(name).compile(backend="inductor")
