"""One network, many budgets: what every threshold costs and predicts, and the one that meets a budget.

    python train_scripts/calibrate.py dg_cifar_resnet26.cifar10 --data path/to/cifar10
    python train_scripts/calibrate.py output/train/model --data digits --target-cost 0.6
    python train_scripts/calibrate.py output/train/model --data digits --target-time 0.7 --time-batch 1 --plot curve.png

The curve: at each threshold (``dg_timm.set_threshold``; *learned*: the network's own), top-1 and mean cost over the
images, the standard deviation of the cost between images (0: all take the same path), and the time in sparse execution
relative to the static network, both in one run, in turn, on the same images: median of the rounds' ratios. Choosing a
threshold on the images that accuracy is reported for flatters it: give ``--val-split train`` to choose, or be aware.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Optional

import timm
import torch
from timm.data import create_transform
from torch import Tensor, nn

import dg_timm
from dg_timm.budget import calibrate
from dg_timm.checkpoint import graph_stages
from dg_timm.cost import relative_cost
from dg_timm.introspect import record_adjacency
from dg_timm.training import arguments, models
from dg_timm.training.loading import Batch
from dg_timm.training.processes import make_accelerator
from dg_timm.training.report import hardware
from dg_timm.training.setup import data_config_of, load_data, make_loader

Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a dg_* name, hf-hub:..., local-dir:..., or a folder")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--target-cost", type=arguments.above_zero, help="multiply-adds relative to the static network")
    budget.add_argument("--target-time", type=arguments.above_zero, help="time relative to the static network")
    parser.add_argument("--thresholds", type=arguments.amount, nargs="+", help="by default from the edges' weights")
    parser.add_argument("--points", type=arguments.positive, default=8, help="how many of those")
    parser.add_argument("--time-batch", type=arguments.positive, nargs="*", default=[1, 32], help="batch sizes to time")
    parser.add_argument("--rounds", type=arguments.positive, default=7)
    parser.add_argument("--threads", type=arguments.positive, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, help="write the curve")
    parser.add_argument("--plot", type=Path, help="draw it (PNG)")
    arguments.add_data_options(parser)
    arguments.add_image_options(parser)
    parser.set_defaults(workers=0)
    args = parser.parse_args()
    args.seed, args.batch_size = 0, 64
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: a ratio needs a spread")
    return args


def load_batches(args: argparse.Namespace, model: nn.Module) -> list[Batch]:
    """The images to evaluate on, preprocessed as the model wants them, all in memory."""
    splits = load_data(args)
    if model.num_classes != len(splits.label_names):
        raise ValueError(f"{args.model} has {model.num_classes} classes, {args.data} has {len(splits.label_names)}")
    config = data_config_of(model, args)
    loader = make_loader(
        splits.test, args, create_transform(**config), splits.label_names, args.batch_size,
        make_accelerator(mixed_precision="no"), config, training=False,
    )  # fmt: skip
    return list(loader.epoch(0))


def thresholds_of(model: nn.Module, images: Tensor, points: int) -> list[float]:
    """0, and the quantiles of the weights that edges have: what closes nothing, to what closes nearly everything."""
    dg_timm.set_threshold(model, 0.0)
    weights = torch.cat([alpha[alpha != 0].abs() for alpha in dg_timm.adjacency(model, images).values()])
    dg_timm.set_threshold(model, None)
    shares = torch.linspace(0, 0.95, points)[1:].to(weights)
    return [
        0.0,
        *(round(float(value), 4) for value in torch.quantile(weights[:: max(1, len(weights) // 10**6)], shares)),
    ]


@torch.inference_mode()
def predict(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, Tensor]:
    """Top-1 (%), and of every image its cost (1 of a static network)."""
    right, costs = [], []
    dynamic = bool(graph_stages(model))
    for batch in batches:
        counts = batch.weights > 0
        if dynamic:
            with record_adjacency(model) as alphas:
                logits = model(batch.images)
            costs.append(relative_cost(model, alphas, tuple(batch.images.shape[1:]))[counts])  # type: ignore[arg-type]
        else:
            logits = model(batch.images)
            costs.append(torch.ones(int(counts.sum())))
        right.append((logits.argmax(1) == batch.labels)[counts])
    return 100 * torch.cat(right).double().mean().item(), torch.cat(costs)


def time_ratios(
    static: Callable[[Tensor], Any],
    others: Sequence[Callable[[Tensor], Any]],
    images: Tensor,
    batch_size: int,
    rounds: int,
) -> list[tuple[float, float, float]]:
    """Of each of ``others``, the time for all images, in batches, relative to ``static``: median and quartiles.

    A round runs every one once, in an order that turns round every time.
    """
    contestants = [static, *others]
    batches = list(images.split(batch_size))

    def seconds(run: Callable[[Tensor], Any]) -> float:
        start = time.perf_counter()
        for batch in batches:
            run(batch)
        return time.perf_counter() - start

    with torch.inference_mode():
        for run in contestants:  # warm up
            run(batches[0])
        table: list[list[float]] = []
        for number in range(rounds):
            order = range(len(contestants)) if number % 2 == 0 else reversed(range(len(contestants)))
            found = {k: seconds(contestants[k]) for k in order}
            table.append([found[k] / found[0] for k in range(1, len(contestants))])
    columns = [[row[k] for row in table] for k in range(len(others))]
    return [(median(c), quantiles(c, n=4)[0], quantiles(c, n=4)[2]) for c in columns]


def at(model: nn.Module, threshold: Optional[float]) -> Callable[[Tensor], Any]:
    """The model in sparse execution at a threshold."""

    def run(images: Tensor) -> Any:
        dg_timm.set_threshold(model, threshold)
        return model(images)

    return run


def curve(
    model: nn.Module,
    static: nn.Module,
    batches: Sequence[Batch],
    thresholds: Sequence[Optional[float]],
    *,
    time_batch: Sequence[int] = (),
    rounds: int = 7,
) -> list[Row]:
    """A row for each threshold (None: the learned ones); the model's setting is lost.

    Args:
        static: the network that times are relative to.
        time_batch: batch sizes; each is timed on its first eight batches, at least 32 images.
    """
    rows: list[Row] = []
    dg_timm.set_execution(model, "dense")
    for threshold in thresholds:
        dg_timm.set_threshold(model, threshold)
        top1, costs = predict(model, batches)
        rows.append(
            {
                "threshold": "learned" if threshold is None else threshold,
                "top1": round(top1, 3),
                "cost": round(costs.mean().item(), 4),
                "spread": round(costs.std(unbiased=False).item(), 4),
            }
        )
    dg_timm.set_execution(model, "sparse")
    images = torch.cat([batch.images for batch in batches])
    for size in time_batch:
        some = images[: max(32, 8 * size)]
        if len(some) < size:
            raise ValueError(f"a batch of {size} can't be timed with {len(some)} images")
        found = time_ratios(static, [at(model, threshold) for threshold in thresholds], some, size, rounds)
        for row, (middle, low, high) in zip(rows, found, strict=True):
            row |= {f"time_{size}": round(middle, 3), f"time_{size}_low": round(low, 3),
                    f"time_{size}_high": round(high, 3)}  # fmt: skip
    dg_timm.set_execution(model, "dense")
    dg_timm.set_threshold(model, None)
    return rows


def static_twin(model: nn.Module) -> nn.Module:
    """The static network that a dynamic one is relative to; its weights do not matter here."""
    name = model.pretrained_cfg["architecture"].removeprefix("dg_")  # type: ignore[index, union-attr]
    return timm.create_model(name, num_classes=model.num_classes, in_chans=model.in_chans).eval()


def table(rows: Sequence[Row]) -> str:
    """Markdown, with the quartiles of times in brackets."""
    times = [key for key in rows[0] if key.startswith("time_") and key.count("_") == 1]
    titles = [
        "threshold",
        "top-1 (%)",
        "cost",
        "spread",
        *(f"time, batch {key.removeprefix('time_')}" for key in times),
    ]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        cells = [str(row["threshold"]), f"{row['top1']:.2f}", f"{row['cost']:.3f}", f"{row['spread']:.3f}"]
        cells += [f"{row[key]:.2f} ({row[f'{key}_low']:.2f} to {row[f'{key}_high']:.2f})" for key in times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Top-1 over cost, and over every time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = ["cost", *(key for key in rows[0] if key.startswith("time_") and key.count("_") == 1)]
    figure = Figure(figsize=(4 * len(keys), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        fixed = sorted((row for row in rows if row["threshold"] != "learned"), key=lambda row: row[key])
        axes.plot([row[key] for row in fixed], [row["top1"] for row in fixed], "o-", label="one threshold")
        for row in rows:
            if row["threshold"] == "learned":
                axes.plot(row[key], row["top1"], "s", label="learned thresholds")
        axes.set_xlabel("cost" if key == "cost" else f"time, batch {key.removeprefix('time_')}")
        axes.set_ylabel("top-1 (%)")
        axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    try:
        model: Any = models.create(args.model, pretrained=not models.names_weights(args.model)).eval()
        if not graph_stages(model):
            raise ValueError(f"{args.model} is static: it has no threshold to choose")
        batches = load_batches(args, model)
        chosen = args.thresholds or thresholds_of(model, batches[0].images, args.points)
        rows = curve(
            model, static_twin(model), batches, [None, *chosen], time_batch=args.time_batch, rounds=args.rounds
        )
        print(table(rows))
        images = sum(int((batch.weights > 0).sum()) for batch in batches)
        print(f"\n{images} images; times on {hardware()}, {args.rounds} rounds")
        if args.csv:
            write_csv(args.csv, rows)
        if args.plot:
            draw(rows, args.plot)
        if args.target_cost is not None:
            found = calibrate(model, [batch.images[batch.weights > 0] for batch in batches], args.target_cost)
            print(json.dumps({"threshold": found.threshold, "cost": found.cost, "spread": found.spread}))
        if args.target_time is not None:
            print(json.dumps(within_time(rows, args.target_time, args.time_batch)))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def within_time(rows: Sequence[Row], target: float, time_batch: Sequence[int]) -> Row:
    """The row of the best accuracy among those within the time of every batch size; ValueError if there is none."""
    if not time_batch:
        raise ValueError("--target-time needs a --time-batch")
    fits = [row for row in rows if all(row[f"time_{size}"] <= target for size in time_batch)]
    if not fits:
        fastest = min(max(row[f"time_{size}"] for size in time_batch) for row in rows)
        raise ValueError(f"no threshold of the curve takes at most {target:g} of the static time; the best {fastest:g}")
    return max(fits, key=lambda row: row["top1"])


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
