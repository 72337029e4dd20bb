"""Calibrate a network with gates: what each budget does, and the budget or cascade that keeps to a cost or a drop."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

import dg_timm
from dg_timm._errors import BadValue
from dg_timm._hardware import describe_hardware
from dg_timm._tables import markdown_table
from dg_timm.budget.choice import BudgetChoice, choose_among, set_choice
from dg_timm.budget.curve import (
    BudgetPoint,
    budget_curve,
    check_budgets,
    keep_curve,
    observe_budget,
    time_points,
)
from dg_timm.hub.save import save_pretrained
from dg_timm.training.data.images import Batch

DEFAULT_MAX_DROP = 2.0  # points of top-1 that a saved network may lose
_BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of a network without a curve
_TIMED_IMAGES = 32


def calibrate_gates(
    args: argparse.Namespace, model: Any, batches: Sequence[Batch], write: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Measure every budget, print and write the curve, choose, and save what was chosen with its curve.

    Args:
        args: options of calibrate.
        model: a classifier with gates, in eval mode.
        batches: to evaluate on.
        write: keeps the curve where the user wants it.

    Raises:
        BadValue: for options that are for thresholds, a budget that can't be met, or a network that lost too much.
    """
    if args.for_thresholds:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in args.for_thresholds)
        raise BadValue(
            f"{args.model} has gates, and {named} are for thresholds: leave them out, and give --target-cost or "
            "--max-drop (dg_timm.set_budget(model, milliseconds=...) afterwards)"
        )
    known = [point.budget for point in budget_curve(model)]
    budgets = check_budgets(args.budgets or sorted({*(known or _BUDGETS)}))
    kept = [batch.sample_mask > 0 for batch in batches]
    pairs = [(batch.images[own], batch.labels[own]) for batch, own in zip(batches, kept, strict=True)]
    progress = tqdm(budgets, desc="accuracy and cost", unit="budget", disable=None)
    observed = {budget: observe_budget(model, pairs, budget) for budget in progress}
    points = [of_budget.summarize(budget) for budget, of_budget in observed.items()]
    points = time_points(model, points, pairs[0][0][:_TIMED_IMAGES])
    print(_table(points))
    images = sum(len(labels) for _, labels in pairs)
    print(f"\n{images} images; median times at batch 1 in sparse execution on {describe_hardware()}")
    write([asdict(point) for point in points])
    keep_curve(model, points)
    if args.target_cost is None and args.max_drop is None:
        return
    drop = None if args.target_cost is not None else args.max_drop
    choice = choose_among(observed, target_cost=args.target_cost, max_drop=drop)
    set_choice(model, choice)
    whole = max(points, key=lambda point: point.budget).top1 or 0.0
    print(json.dumps({**asdict(choice), "drop": round(whole - choice.top1, 3)}))
    if args.save:
        _save(args, model, choice, whole)


def _table(points: Sequence[BudgetPoint]) -> str:
    header = ["budget", "top-1 (%)", "cost", "spread", "ms an image"]
    return markdown_table(
        header,
        [[f"{p.budget:g}", f"{p.top1:.2f}", f"{p.cost:.3f}", f"{p.spread:.3f}", f"{p.milliseconds:.2f}"]
         for p in points],
    )  # fmt: skip


def _save(args: argparse.Namespace, model: Any, choice: BudgetChoice, whole: float) -> None:
    lost, most = whole - choice.top1, DEFAULT_MAX_DROP if args.max_drop is None else args.max_drop
    if lost > most + 1e-9:
        raise BadValue(
            f"the network at this cost loses {lost:.2f} points of top-1, and was not saved; allow it with --max-drop "
            f"{math.ceil(100 * lost) / 100:g}, or aim at a higher cost"
        )
    made = {
        "From": Path(args.model).name,
        "Budgets": f"{', '.join(f'{b:g}' for b in choice.budgets)}, chosen on images of {Path(args.data).name}",
        "There": f"top-1 {choice.top1:.2f} % at a cost of {choice.cost:.3f}",
    }
    save_pretrained(model, args.save, card=dg_timm.Card(made=made))
    if choice.threshold is None:  # a budget is a setting of the process
        print(f"loaded again: dg_timm.set_budget(model, {choice.cost!r})")
