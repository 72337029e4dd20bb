"""One network, many budgets: what every threshold costs and predicts, and the one that meets a budget.

    python train_scripts/calibrate.py dg_cifar_resnet26.cifar10 --data path/to/cifar10
    python train_scripts/calibrate.py output/train/model --data digits --target-cost 0.6
    python train_scripts/calibrate.py output/train/model --data digits --target-time 0.7 --time-batch 1 --plot curve.png
    python train_scripts/calibrate.py output/train/model --data digits --target-cost 0.6 --save output/at_0.6

The curve: at each threshold (``dg_timm.set_threshold``; *learned*: the network's own), top-1 and mean cost over the
images, the standard deviation of the cost between images (0: all take the same path), and the time in sparse execution
relative to the static network, both in one run, in turn, on the same images: median of the rounds' ratios. Choosing a
threshold on the images that accuracy is reported for flatters it: give ``--val-split train`` to choose, or be aware.

A network was normalised for what its own thresholds let through. ``--refit-norms N`` takes the statistics of its norms
anew at every other threshold, over N training images (``dg_timm.refit_norms``): without them accuracy falls far
below what the same weights can do. (These images are not augmented, which suits test images better and can alone be
worth half a point, to any network; the point *learned* is left as it was trained.) ``--save`` keeps the network of the
chosen point, with its threshold and norms, as one that ``timm.create_model("local-dir:...", pretrained=True)`` loads.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import timm
import torch
from timm.data import create_transform
from torch import Tensor, nn

import dg_timm
from dg_timm.analysis.counting import relative_cost
from dg_timm.analysis.recorder import record_adjacency
from dg_timm.budget.norms import refit_norms
from dg_timm.graph.stage import graph_stages, routers
from dg_timm.training.data.loading import Batch
from dg_timm.training.data.sources import Split
from dg_timm.training.loop.distributed import make_accelerator
from dg_timm.training.run import arguments
from dg_timm.training.run import networks as models
from dg_timm.training.run.build import data_config_of, limit, load_data, make_loader
from dg_timm.training.run.report import hardware, write_csv

Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the images, and of what is done with them."""
    parser.add_argument(
        "--refit-norms", type=arguments.natural, default=1024, metavar="N", help="0 leaves the norms as they are"
    )
    arguments.add_data_options(parser)
    arguments.add_image_options(parser)
    parser.set_defaults(workers=0, seed=0, batch_size=64)


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
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the network at the budget's threshold")
    parser.add_argument("--csv", type=Path, help="write the curve")
    parser.add_argument("--plot", type=Path, help="draw it (PNG)")
    add_options(parser)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: a ratio needs a spread")
    if args.save and args.target_cost is None and args.target_time is None:
        parser.error("--save keeps the network at a budget: give --target-cost or --target-time")
    if args.target_time is not None and not args.time_batch:
        parser.error("--target-time needs a --time-batch")
    if args.save and args.save.exists() and (not args.save.is_dir() or any(args.save.iterdir())):
        parser.error(f"--save {args.save} is there already; give a new folder")
    for path in filter(None, (args.csv, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    return args


def load_batches(args: argparse.Namespace, model: nn.Module) -> tuple[list[Batch], list[Tensor]]:
    """The images to evaluate on, and those to refit norms with, preprocessed as the model wants them, in memory."""
    splits = load_data(args)
    if model.num_classes != len(splits.label_names):
        raise ValueError(f"{args.model} has {model.num_classes} classes, {args.data} has {len(splits.label_names)}")
    config = data_config_of(model, args)
    transform, accelerator = create_transform(**config), make_accelerator(mixed_precision="no")

    def batches(split: Split) -> list[Batch]:
        loader = make_loader(
            split, args, transform, splits.label_names, args.batch_size, accelerator, config, training=False
        )
        return list(loader.epoch(0))

    if not args.refit_norms:
        return batches(splits.test), []
    some = limit(splits.train, min(args.refit_norms, splits.train.size or args.refit_norms), "--refit-norms")
    return batches(splits.test), [batch.images[batch.weights > 0] for batch in batches(some)]


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


class Timing(NamedTuple):
    """Median ratio of the rounds to the static network with its quartiles, and median milliseconds an image of both."""

    ratio: float
    low: float
    high: float
    ms: float
    static_ms: float


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
) -> list[Timing]:
    """Of each of ``others``, the time for all images, in batches, beside that of ``static``.

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
            table.append([found[k] for k in range(len(contestants))])
    timings = []
    for k in range(1, len(contestants)):
        low, middle, high = quantiles([row[k] / row[0] for row in table], n=4)
        of_static, own = (1000 * median(row[c] for row in table) / len(images) for c in (0, k))
        timings.append(Timing(middle, low, high, own, of_static))
    return timings


def variants(model: nn.Module, thresholds: Sequence[float], refit: Sequence[Tensor]) -> dict[str, nn.Module]:
    """The model with its learned thresholds, and a copy of it at each of ``thresholds``, with norms of its own."""
    found = {"learned": model}
    for threshold in thresholds:
        found[str(threshold)] = copy.deepcopy(model)
        dg_timm.set_threshold(found[str(threshold)], threshold)
        if refit:
            refit_norms(found[str(threshold)], refit)
    return found


def curve(
    models: Mapping[str, nn.Module],
    static: nn.Module,
    batches: Sequence[Batch],
    *,
    time_batch: Sequence[int] = (),
    rounds: int = 7,
) -> list[Row]:
    """A row for each of :func:`variants`, in eval mode; they end in sparse execution.

    Args:
        static: the network that times are relative to.
        time_batch: batch sizes; each is timed on its first eight batches, at least 32 images.
    """
    rows: list[Row] = []
    for threshold, model in models.items():
        dg_timm.set_execution(model, "dense")
        top1, costs = predict(model, batches)
        dg_timm.set_execution(model, "sparse")
        rows.append(
            {
                "threshold": threshold,
                "top1": round(top1, 3),
                "cost": round(costs.mean().item(), 4),
                "spread": round(costs.std(unbiased=False).item(), 4),
            }
        )
    images = torch.cat([batch.images for batch in batches])
    for size in time_batch:
        some = images[: max(32, 8 * size)]
        if len(some) < size:
            raise ValueError(f"a batch of {size} can't be timed with {len(some)} images")
        found = time_ratios(static, list(models.values()), some, size, rounds)
        for row, timing in zip(rows, found, strict=True):
            row |= time_columns(size, timing)
    return rows


def time_columns(size: int, timing: Timing) -> Row:
    """Columns of a table for a batch size."""
    return {
        f"time_{size}": round(timing.ratio, 3),
        f"time_{size}_low": round(timing.low, 3),
        f"time_{size}_high": round(timing.high, 3),
        f"time_{size}_ms": round(timing.ms, 3),
        f"time_{size}_static_ms": round(timing.static_ms, 3),
    }


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
        batches, refit = load_batches(args, model)
        chosen = args.thresholds or thresholds_of(model, batches[0].images, args.points)
        by_threshold = variants(model, chosen, refit)
        rows = curve(by_threshold, static_twin(model), batches, time_batch=args.time_batch, rounds=args.rounds)
        print(table(rows))
        images = sum(int((batch.weights > 0).sum()) for batch in batches)
        print(f"\n{images} images; times on {hardware()}, {args.rounds} rounds")
        if args.csv:
            write_csv(args.csv, rows)
        if args.plot:
            draw(rows, args.plot)
        if args.target_cost is not None:
            best = within(rows, args.target_cost, ["cost"])
        elif args.target_time is not None:
            best = within(rows, args.target_time, [f"time_{size}" for size in args.time_batch])
        else:
            return 0
        print(json.dumps(best))
        if args.save:
            keep(by_threshold[str(best["threshold"])], best, args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def keep(model: nn.Module, best: Row, args: argparse.Namespace) -> None:
    """Save a network whose threshold in force becomes its learned one."""
    dg_timm.set_execution(model, "dense")
    for router in routers(model).values():
        if router.fixed_threshold is not None:
            router.threshold.data.fill_(router.fixed_threshold)
    dg_timm.set_threshold(model, None)
    budget = f"cost {args.target_cost:g}" if args.target_cost is not None else f"time {args.target_time:g}"
    made = {
        "From": Path(args.model).name,
        "Threshold": f"{best['threshold']}, chosen for a {budget} on images of {Path(args.data).name}",
        "There": f"top-1 {best['top1']} % at a cost of {best['cost']}",
    }
    dg_timm.save_pretrained(model, args.save, card=dg_timm.Card(made=made))


def within(rows: Sequence[Row], target: float, keys: Sequence[str]) -> Row:
    """The most accurate row among those that keep to a budget in every one of ``keys``; ValueError if there is none."""
    fits = [row for row in rows if all(row[key] <= target for key in keys)]
    if not fits:
        least = min(max(row[key] for key in keys) for row in rows)
        raise ValueError(f"no threshold of the curve keeps to {target:g}; the least is {least:g}")
    return max(fits, key=lambda row: float(row["top1"]))
