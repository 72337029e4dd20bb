"""Make the folder of the network that ships with the package, from the trials and the table of budgets.py.

    python train_scripts/experiments/ship.py --data path/to/cifar10 --full --distill

It holds the dynamic network with its learned thresholds, as it was trained: config, weights, the wiring of some test
images, and a card whose figures are those of ``times.csv``. ``publish.py`` would send the same folder.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dg_timm
from dg_timm._errors import BadState, BadValue
from dg_timm.cli.errors import cli_errors
from dg_timm.experiments.budgets import trials
from dg_timm.experiments.curves import DEEPEST, DYNAMIC, TIMED, calibrate_options
from dg_timm.experiments.options import make_parser, parse
from dg_timm.experiments.runner import run_trials
from dg_timm.experiments.trial import Result
from dg_timm.hub.card import InferenceTime
from dg_timm.training.run import networks, operating_points
from dg_timm.training.run.option_types import fraction, non_negative_int

TAG = "cifar10"
_PICTURES = 4
_CANDIDATES = 64  # images among which the cheapest and dearest are drawn
_LIMITS = "Ten classes of small pictures, few epochs, one seed: a longer training gives far better networks."
_DATA = "a JPEG copy of CIFAR-10 (quality 75), so that figures are not those of CIFAR-10 to the last digit"


def find_trainings(args: argparse.Namespace, name: str) -> list[Result]:
    """Find the trainings behind a network, in order: its own is the last.

    Raises:
        BadState: if it is not trained, or was deleted.
    """
    planned = trials([DYNAMIC, DEEPEST], args.seed, [args.target_cost], args.full, args.distill)
    results = {result.trial.name: result for result in run_trials(planned, args)}
    if name not in results or not results[name].network.exists():
        raise BadState(f"{name} is not in {args.results} and {args.output}; train it with budgets.py")
    trainings = [results[name]]
    while (before := trainings[0].trial.depends_on.get("initial-checkpoint")) is not None:
        trainings.insert(0, results[before.name])
    return trainings


def read_times(file: Path, name: str, static_name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Read the rows of the dynamic network as it was trained, and of the static one beside it.

    Raises:
        BadState: if there is no such row.
    """
    rows: list[dict[str, str]] = []
    if file.exists():
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    of_learned = (row for row in rows if row["network"] == name and row["point"] == operating_points.LEARNED)
    own, static = next(of_learned, None), next((row for row in rows if row["network"] == static_name), None)
    if own is None or static is None:
        raise BadState(f"{file} has no row of {name} or {static_name}; run budgets.py")
    return own, static


def make_card(
    own: Mapping[str, str], static: Mapping[str, str], trainings: Sequence[Result], args: argparse.Namespace
) -> dg_timm.Card:
    """Write the card from the rows of both networks, and what trained the dynamic one."""
    recipes = ", then ".join(
        f"{r.figures['epoch']:.0f} epochs of the recipe `{r.trial.options['recipe']}`"
        + (f", learning also the logits of {DEEPEST}" if "distill" in r.trial.depends_on else "")
        for r in trainings
    )
    cost, spread = (100 * float(own[key]) for key in ("cost", "spread"))
    accuracy = dg_timm.Accuracy(
        dataset="CIFAR-10 (JPEG copy)",
        value=float(own["top1"]),
        static=float(static["top1"]),
        images=10000,
        spread="one seed, after as many epochs each",
        hub_dataset="uoft-cs/cifar10",
    )
    return dg_timm.Card(
        summary="The residual network of 26 layers for CIFAR-10 as a dynamic graph that learned to close: on average "
        f"an image takes {cost:.0f} % of the static network's multiply-adds (standard deviation between images "
        f"{spread:.0f} points). For demonstrations, tests and first experiments.",
        license="apache-2.0",
        datasets=["uoft-cs/cifar10"],
        made={
            "Training": "from scratch by `train_scripts/experiments/budgets.py` of dg_timm, with "
            f"`--target-cost {args.target_cost:g}` and blocks without shortcuts of their own: {recipes}",
            "Data": _DATA,
            "Hardware": ", then ".join(f"{r.hardware}, {r.seconds / 60:.0f} minutes" for r in trainings),
            "Seed": str(args.seed),
        },
        accuracies=[accuracy],
        times=[_time(own, size) for size in TIMED],
        limits=_LIMITS,
        citation="",
    )


def _time(own: Mapping[str, str], size: int) -> InferenceTime:
    ratio, low, high, dynamic_ms, static_ms = (
        float(own[f"time_{size}{column}"]) for column in ("", "_low", "_high", "_ms", "_static_ms")
    )
    return InferenceTime(
        hardware=f"{own['time_hardware']}, sparse execution",
        batch_size=size,
        image_size=32,
        static_ms=static_ms,
        dynamic_ms=dynamic_ms,
        ratio=ratio,
        low=low,
        high=high,
        rounds=int(own["time_rounds"]),
    )


def load_network(result: Result, data: str) -> tuple[Any, Tensor]:
    """Load the network, and the test images that it spends least and most on (images, 3, 32, 32).

    Raises:
        BadValue: if it was not trained on CIFAR-10.
    """
    model = networks.create(str(result.network)).eval()
    names = model.pretrained_cfg["label_names"]
    if len(names) != 10 or "airplane" not in names:
        raise BadValue(f"{result.network} knows {', '.join(names[:3])} ...: the card is about CIFAR-10")
    chosen = vars(calibrate_options(data)) | {"val_limit": _CANDIDATES, "refit_norms": 0, "model": DYNAMIC}
    batches, _ = operating_points.load_batches(argparse.Namespace(**chosen), model)
    order = torch.cat([dg_timm.cost(model, batch.images) for batch in batches]).argsort()
    extremes = torch.cat([order[: _PICTURES // 2], order[-_PICTURES // 2 :]])
    return model, torch.cat([batch.images for batch in batches])[extremes]


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Make the folder; return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="folder to write; by default that of the package")
    parser.add_argument("--target-cost", type=fraction, default=0.6, help="cost that the network learned")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the network")
    parser.add_argument("--distill", action="store_true", help="take the network of budgets.py --distill")
    args = parse(parser, "budgets", "the networks of budgets.py --full", argv)
    args.collect = True
    name = f"{DYNAMIC}-{args.target_cost:g}{'-distilled' if args.distill else ''}"
    trainings = find_trainings(args, name)
    static_name = f"{DEEPEST}{'-longer' if args.distill else ''}"
    own, static = read_times(args.results / "times.csv", name, static_name)
    model, images = load_network(trainings[-1], args.data)
    folder = args.folder or Path(dg_timm.__file__).parent / "models" / "pretrained" / f"{DYNAMIC}.{TAG}"
    dg_timm.save_pretrained(model, folder, overwrite=True, card=make_card(own, static, trainings, args), images=images)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
