"""Make the folder of the network that ships with the package, from the cells and the table of budgets.py.

    python train_scripts/experiments/ship.py --data path/to/cifar10 --full --distill

The dynamic network with its learned thresholds, as trained: config, weights, the wiring of some test images, and a card
whose figures are those of ``times.csv``. ``publish.py`` would send the same folder.
"""

import argparse
import csv
from pathlib import Path

import torch

import dg_timm
from dg_timm.cli import calibrate
from dg_timm.experiments.budgets import DEEPEST, DYNAMIC, TIMED, cells, parse_data
from dg_timm.experiments.runner import parse, run
from dg_timm.hub.card import InferenceTime
from dg_timm.training.run import networks as models
from dg_timm.training.run.arguments import natural, share

TAG = "cifar10"
PICTURES = 4


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="by default that of the package")
    parser.add_argument("--target-cost", type=share, default=0.6)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--distill", action="store_true", help="as of budgets.py")
    args = parse(parser, "budgets", "as of budgets.py")
    args.collect = True
    name = f"{DYNAMIC}-{args.target_cost:g}{'-distilled' if args.distill else ''}"
    beside = f"{DEEPEST}{'-longer' if args.distill else ''}"
    planned = cells([DYNAMIC, DEEPEST], args.seed, [args.target_cost], args.full, args.distill)
    results = {r.cell.name: r for r in run(planned, args)}
    missing = next((cell for cell in planned if cell.name == name and cell.name not in results), None)
    if missing or not results[name].network.exists():
        raise ValueError(f"{name} is not in {args.results} and {args.output}; train it with budgets.py")
    cell = results[name]
    measured = rows_of(args.results / "times.csv")
    own = next((row for row in measured if row["network"] == name and row["point"] == "learned"), None)
    static = next((row for row in measured if row["network"] == beside), None)
    if own is None or static is None:
        raise ValueError(f"{args.results / 'times.csv'} has no row of {name} or {beside}; run budgets.py")
    trainings = [cell]
    while (before := trainings[0].cell.networks.get("initial-checkpoint")) is not None:
        trainings.insert(0, results[before.name])
    model = models.create(str(cell.network)).eval()
    if len(names := model.pretrained_cfg["label_names"]) != 10 or "airplane" not in names:
        raise ValueError(f"{name} in {args.output} knows {', '.join(names[:3])} ...: the card is about CIFAR-10")
    some = argparse.Namespace(**vars(parse_data(args)) | {"val_limit": 64, "refit_norms": 0, "model": DYNAMIC})
    batches, _ = calibrate.load_batches(some, model)
    card = dg_timm.Card(
        summary="The residual network of 26 layers for CIFAR-10 as a dynamic graph that learned to close: on average "
        f"an image takes {100 * float(own['cost']):.0f} % of the static network's multiply-adds (standard deviation "
        f"between images {100 * float(own['spread']):.0f} points). For demonstrations, tests and first experiments.",
        license="apache-2.0",
        datasets=["uoft-cs/cifar10"],
        made={
            "Training": "from scratch by `train_scripts/experiments/budgets.py` of dg_timm, with "
            f"`--target-cost {args.target_cost:g}` and blocks without shortcuts of their own: "
            + ", then ".join(
                f"{r.figures['epoch']:.0f} epochs of the recipe `{r.cell.options['recipe']}`"
                + (f", learning also the logits of {DEEPEST}" if "distill" in r.cell.networks else "")
                for r in trainings
            ),
            "Data": "a JPEG copy of CIFAR-10 (quality 75), so that figures are not those of CIFAR-10 to the last digit",
            "Hardware": ", then ".join(f"{r.hardware}, {r.seconds / 60:.0f} minutes" for r in trainings),
            "Seed": str(args.seed),
        },
        accuracies=[
            dg_timm.Accuracy(
                dataset="CIFAR-10 (JPEG copy)",
                value=float(own["top1"]),
                static=float(static["top1"]),
                images=10000,
                spread="one seed, after as many epochs each",
                hub_dataset="uoft-cs/cifar10",
            )
        ],
        times=[
            InferenceTime(
                hardware=f"{own['time_hardware']}, sparse execution",
                batch_size=size,
                image_size=32,
                static_ms=float(own[f"time_{size}_static_ms"]),
                dynamic_ms=float(own[f"time_{size}_ms"]),
                ratio=float(own[f"time_{size}"]),
                low=float(own[f"time_{size}_low"]),
                high=float(own[f"time_{size}_high"]),
                rounds=int(own["time_rounds"]),
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
