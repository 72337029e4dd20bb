"""Make the folder of the network that ships with the package, from the cells and the table of budgets.py.

    python train_scripts/experiments/ship.py --data path/to/cifar10

The dynamic network with its learned thresholds, as trained: config, weights, the wiring of some test images, and a card
whose figures are those of ``budgets.csv`` and ``times.csv``. ``publish.py`` would send the same folder.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch
from budgets import DEEPEST, DYNAMIC, TIMED, cells
from cells import SCRIPTS, add_options, run

sys.path.insert(0, str(SCRIPTS))
import calibrate

import dg_timm
from dg_timm.card import InferenceTime
from dg_timm.training import models

TAG = "cifar10"
PICTURES = 4


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "budgets")
    parser.add_argument("--folder", type=Path, help="by default that of the package")
    parser.add_argument("--target-cost", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.collect = True
    name = f"{DYNAMIC}-{args.target_cost:g}"
    chosen_cells = cells([DYNAMIC, DEEPEST], args.seed, [args.target_cost], False)
    results = {r.cell.name: r for r in run(chosen_cells, args)}
    cell = results[name]
    if not cell.network.exists():
        print(f"error: {cell.network} is not there; train it with budgets.py", file=sys.stderr)
        return 2
    measured = rows_of(args.results / "times.csv")
    own = next(row for row in measured if row["network"] == name and row["point"] == "learned")
    static = next(row for row in measured if row["network"] == DEEPEST)
    kept: dict[str, Any] = json.loads((args.results / f"{cell.cell.folder}.json").read_text())
    minutes = sum(results[part].seconds for part in (f"{name}-16px", name)) / 60
    model = models.create(str(cell.network)).eval()
    args_ = argparse.ArgumentParser()
    calibrate.add_options(args_)
    batches, _ = calibrate.load_batches(
        argparse.Namespace(
            **vars(args_.parse_args(["--data", args.data, "--val-limit", "64", "--refit-norms", "0"])), model=DYNAMIC
        ),
        model,
    )
    card = dg_timm.Card(
        summary="The residual network of 26 layers for CIFAR-10 as a dynamic graph that learned to close: on average "
        f"an image takes {100 * float(own['cost']):.0f} % of the static network's multiply-adds (standard deviation "
        f"between images {100 * float(own['spread']):.0f} points). For demonstrations, tests and first experiments.",
        license="apache-2.0",
        datasets=["uoft-cs/cifar10"],
        made={
            "Training": "from scratch by `train_scripts/experiments/budgets.py` of dg_timm: recipe `cifar10_16px` "
            "(6 epochs at 16 px), then `cifar10_32px` (4 epochs at 32 px), both with "
            f"`--target-cost {kept['options']['target-cost']}`; blocks without shortcuts of their own",
            "Data": "a JPEG copy of CIFAR-10 (quality 75), so that figures are not those of CIFAR-10 to the last digit",
            "Hardware": f"{kept['hardware']}; {minutes:.0f} minutes",
            "Seed": str(args.seed),
        },
        accuracies=[
            dg_timm.Accuracy(
                dataset="CIFAR-10 (JPEG copy)",
                value=float(own["top1"]),
                static=float(static["top1"]),
                images=10000,
                spread="one seed, after the last epoch",
                hub_dataset="uoft-cs/cifar10",
            )
        ],
        times=[
            InferenceTime(
                hardware=f"{kept['hardware']}, sparse execution",
                batch_size=size,
                image_size=32,
                static_ms=float(own[f"time_{size}_static_ms"]),
                dynamic_ms=float(own[f"time_{size}_ms"]),
                ratio=float(own[f"time_{size}"]),
                low=float(own[f"time_{size}_low"]),
                high=float(own[f"time_{size}_high"]),
                rounds=9,
            )
            for size in TIMED
        ],
        limits="Ten classes of small pictures, few epochs, one seed: a longer training gives far better networks.",
        citation="",
    )
    order = torch.cat([dg_timm.cost(model, batch.images) for batch in batches]).argsort()
    chosen = torch.cat([order[: PICTURES // 2], order[-PICTURES // 2 :]])
    images = torch.cat([batch.images for batch in batches])[chosen]
    folder = args.folder or Path(dg_timm.__file__).parent / "trained" / f"{DYNAMIC}.{TAG}"
    dg_timm.save_pretrained(model, folder, overwrite=True, card=card, images=images)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
