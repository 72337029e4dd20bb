"""One network, many budgets: what every threshold costs and predicts, and the one that meets a budget.

    dg-timm calibrate dg_cifar_resnet26.cifar10 --data path/to/cifar10
    dg-timm calibrate output/train/model --data digits --target-cost 0.6
    dg-timm calibrate output/train/model --data digits --target-time 0.7 --time-batch 1 --plot curve.png
    dg-timm calibrate output/train/model --data digits --target-cost 0.6 --save output/at_0.6
    dg-timm calibrate output/skip/model --data path/to/images --max-drop 0.2 --save output/cascade

Of a network with gates, the curve has a point for each budget of its gates. ``--target-cost`` chooses the highest top-1
at that mean cost, ``--max-drop`` the lowest cost that loses no more points: one budget for all images, or a cascade of
two budgets. ``--save`` keeps the network with its curve and cascade. What follows is about all other networks.

The curve has a point for each threshold (``dg_timm.set_threshold``), and one, *learned*, for the network's own. A point
has top-1, the mean cost of an image, the standard deviation of the cost between images (0: all take the same path), and
the time in sparse execution relative to the static network. Times are medians of rounds in which both networks run in
turn on the same images. A threshold that was chosen on the images that accuracy is reported for flatters it: choose on
``--val-split train``, or be aware of it.

The norms of a network fit what its own thresholds let through. ``--refit-norms N`` estimates their statistics for every
other threshold from N training images (``dg_timm.refit_norms``); without it accuracy falls far below what the same
weights can do. (These images are not augmented, which suits test images better and can alone be worth half a point, to
any network; the point *learned* stays as it was trained.) ``--save`` keeps the network of the chosen point, with its
threshold and norms, as one that ``timm.create_model("local-dir:...", pretrained=True)`` loads.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from dg_timm._command_line import CommandParser
from dg_timm._errors import BadValue
from dg_timm._hardware import describe_hardware
from dg_timm.cli.errors import cli_errors
from dg_timm.cli.gate_budgets import DEFAULT_MAX_DROP, calibrate_gates
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import graph_stages
from dg_timm.hub.labeling import labeling_of
from dg_timm.training.loop.csv_tables import write_csv
from dg_timm.training.run import data_options, networks, operating_points
from dg_timm.training.run.operating_points import Row
from dg_timm.training.run.option_types import fraction, non_negative_float, positive_float, positive_int

# Options that say nothing to a network with gates
_FOR_THRESHOLDS = ("target_time", "thresholds", "points", "time_batch", "rounds", "plot", "refit_norms")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process), and refuse options that do not go together."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="network: a dg_* name, hf-hub:..., local-dir:..., or a folder")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--target-cost",
        type=positive_float,
        help="budget: multiply-adds relative to the static network; by default no point is chosen",
    )
    budget.add_argument(
        "--target-time",
        type=positive_float,
        help="budget: time relative to the static network, at every --time-batch; by default no point is chosen",
    )
    parser.add_argument(
        "--thresholds",
        type=non_negative_float,
        nargs="+",
        help="thresholds of the curve; by default --points quantiles of the edges' weights",
    )
    parser.add_argument("--points", type=positive_int, default=8, help="number of thresholds, without --thresholds")
    parser.add_argument("--time-batch", type=positive_int, nargs="*", default=[1, 32], help="batch sizes to time")
    parser.add_argument("--rounds", type=positive_int, default=7, help="number of rounds of timing, at least 2")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="new folder for the network at the budget; by default none is saved"
    )
    parser.add_argument(
        "--max-drop",
        type=non_negative_float,
        help="points of top-1 that --save may lose against the network as it is, by default 2; of a network with "
        "gates, without --target-cost, choose the lowest cost that loses no more",
    )
    parser.add_argument(
        "--budgets", type=fraction, nargs="+", help="budgets of gates; by default those that it was trained for"
    )
    parser.add_argument("--csv", type=Path, help="CSV file for the curve; by default none is written")
    parser.add_argument("--plot", type=Path, help="PNG file for a picture of the curve; by default none is drawn")
    operating_points.add_options(parser)
    args = parser.parse_args(argv)
    args.for_thresholds = [name for name in _FOR_THRESHOLDS if getattr(args, name) != parser.get_default(name)]
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: a ratio needs a spread")
    if args.save and args.target_cost is None and args.target_time is None and args.max_drop is None:
        parser.error("--save keeps the network at a budget: give --target-cost or --target-time")
    if args.target_time is not None and not args.time_batch:
        parser.error("--target-time needs a --time-batch")
    if args.save and args.save.exists() and (not args.save.is_dir() or any(args.save.iterdir())):
        parser.error(f"--save {args.save} is there already; give a new folder")
    return args


def calibrate_network(args: argparse.Namespace) -> None:
    """Measure the curve, print and write it, and choose the point that meets the budget.

    Raises:
        BadValue: for a network, data or a budget that can't be used.
    """
    pretrained = not networks.implies_pretrained(args.model)
    model: Any = networks.create(args.model, pretrained=pretrained).eval()
    if not graph_stages(model):
        raise BadValue(f"{args.model} is static: it has no threshold to choose")
    if labeling_of(model).task != "single":
        raise BadValue(f"{args.model} was trained with --task {labeling_of(model).task}, and calibration measures "
                       "top-1: train it towards a cost (--target-cost), or call dg_timm.measure_budgets")  # fmt: skip
    if gates(model):
        args.refit_norms = 0
        batches, _ = operating_points.load_batches(args, model)
        calibrate_gates(args, model, batches, lambda rows: _write(args, rows))
        return
    if args.budgets or (args.save and args.target_cost is None and args.target_time is None):
        raise BadValue(f"{args.model} has no gates: give --target-cost or --target-time, and no --budgets")
    batches, refit = operating_points.load_batches(args, model)
    thresholds = args.thresholds or operating_points.thresholds_of(model, batches[0].images, args.points)
    models = operating_points.at_thresholds(model, thresholds, refit)
    static = operating_points.make_static(model)
    rows = operating_points.measure_curve(models, static, batches, time_batch=args.time_batch, rounds=args.rounds)
    images = sum(int((batch.sample_mask > 0).sum()) for batch in batches)
    print(operating_points.curve_table(rows))
    print(f"\n{images} images; times on {describe_hardware()}, {args.rounds} rounds")
    _write(args, rows)
    best = _choose(args, rows)
    if best is None:
        return
    print(json.dumps(best))
    if args.save:
        lost = rows[0]["top1"] - best["top1"]
        if lost > (DEFAULT_MAX_DROP if args.max_drop is None else args.max_drop):
            raise BadValue(
                f"the network at this budget loses {lost:.2f} points of top-1, and was not saved; allow it with "
                f"--max-drop {math.ceil(lost)}, or train for the budget (train --target-cost)"
            )
        operating_points.save_at(models[str(best["threshold"])], args.save, _made(args, best))


def _write(args: argparse.Namespace, rows: list[Row]) -> None:
    try:
        for path in filter(None, (args.csv, args.plot)):
            path.parent.mkdir(parents=True, exist_ok=True)
        if args.csv:
            write_csv(args.csv, rows)
        if args.plot:
            operating_points.draw_curve(rows, args.plot)
    except OSError as error:
        raise BadValue(f"the curve can't be written: {error}") from error


def _choose(args: argparse.Namespace, rows: list[Row]) -> Row | None:
    if args.target_cost is not None:
        return operating_points.best_within(rows, args.target_cost, ["cost"])
    if args.target_time is not None:
        return operating_points.best_within(rows, args.target_time, [f"time_{size}" for size in args.time_batch])
    return None


def _made(args: argparse.Namespace, best: Row) -> dict[str, str]:
    budget = f"cost {args.target_cost:g}" if args.target_cost is not None else f"time {args.target_time:g}"
    return {
        "From": Path(args.model).name,
        "Threshold": f"{best['threshold']}, chosen for a {budget} on images of {Path(args.data).name}",
        "There": f"top-1 {best['top1']} % at a cost of {best['cost']}",
    }


@cli_errors
def main() -> int:
    """Calibrate a network; return the exit status."""
    args = parse()
    data_options.require_data(args)
    torch.set_num_threads(args.threads)
    calibrate_network(args)
    return 0
