"""One network at many thresholds: what each costs and predicts, and the one that meets a budget."""

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.utils import tqdm
from timm.data import create_transform
from torch import Tensor, nn

import dg_timm
from dg_timm._errors import BadValue
from dg_timm._modes import evaluating
from dg_timm._tables import markdown_table
from dg_timm.analysis.counting import count_costs, recorded_cost
from dg_timm.analysis.recorder import recording
from dg_timm.budget.norms import refit_norms
from dg_timm.graph.stage import graph_stages, routers
from dg_timm.training.data.images import Batch
from dg_timm.training.data.splits import Split
from dg_timm.training.data.summary import describe_data
from dg_timm.training.loop.distributed import make_accelerator
from dg_timm.training.run import data_options
from dg_timm.training.run.build_data import data_config_of, limit, load_data, make_loader
from dg_timm.training.run.classes import match_classes
from dg_timm.training.run.option_types import non_negative_int
from dg_timm.training.run.timing import time_columns, time_ratios

Row = dict[str, Any]

LEARNED = "learned"  # the operating point at which the network was trained
_MOST_CLOSED = 0.95  # the highest threshold is this quantile of the edges' weights
_MOST_WEIGHTS = 10**6  # torch.quantile takes no more than some millions
_LEAST_TIMED, _TIMED_BATCHES = 32, 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the images to evaluate on, and those to refit norms with."""
    parser.add_argument(
        "--refit-norms",
        type=non_negative_int,
        default=1024,
        metavar="N",
        help="number of training images over which the statistics of norms are estimated for every threshold; 0 leaves "
        "them as they are",
    )
    data_options.add_data_options(parser)
    data_options.add_image_options(parser)
    parser.set_defaults(workers=0, seed=0, batch_size=64)


def load_batches(args: argparse.Namespace, model: nn.Module) -> tuple[list[Batch], list[Tensor]]:
    """Load images into memory, preprocessed as the model wants them, and say what the data hold.

    Where no norms are refitted, nothing is set aside for that: of a folder of held-out images all are evaluated on.

    Args:
        args: options of :func:`add_options`, and ``model``, the network's name.
        model: a timm model.

    Returns:
        the batches to evaluate on, and the images to refit norms with, each (batch, channels, height, width).

    Raises:
        BadValue: for data that can't be used, or of another number of classes.
    """
    splits = load_data(args, only_evaluate=not args.refit_norms)
    print(describe_data(splits, args.data), file=sys.stderr)
    label_names = match_classes(args.model, model, splits, args.data, None)
    config = data_config_of(model, args)
    transform, accelerator = create_transform(**config), make_accelerator(mixed_precision="no")

    def batches(split: Split) -> list[Batch]:
        loader = make_loader(split, args, transform, label_names, args.batch_size, accelerator, config, training=False)
        return list(loader.epoch(0))

    if not args.refit_norms:
        return batches(splits.test), []
    some = limit(splits.train, min(args.refit_norms, splits.train.size or args.refit_norms), "--refit-norms")
    return batches(splits.test), [batch.images[batch.sample_mask > 0] for batch in batches(some)]


def thresholds_of(model: nn.Module, images: Tensor, points: int) -> list[float]:
    """Choose thresholds from 0, which closes nothing, to a quantile of the edges' weights that closes nearly all.

    Args:
        model: a dynamic network; its own thresholds are in force again afterwards.
        images: (batch, channels, height, width).
        points: number of thresholds.
    """
    dg_timm.set_threshold(model, 0.0)
    try:
        weights = torch.cat([alpha[alpha != 0].abs() for alpha in dg_timm.adjacency(model, images).values()])
    finally:
        dg_timm.set_threshold(model, None)
    shares = torch.linspace(0, _MOST_CLOSED, points)[1:].to(weights)
    some = weights[:: max(1, len(weights) // _MOST_WEIGHTS)]
    return [0.0, *(round(float(value), 4) for value in torch.quantile(some, shares))]


@torch.inference_mode()
def predict(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, Tensor]:
    """Evaluate a network, static or dynamic, in eval mode.

    Returns:
        top-1 in percent, and (images,) the cost of each image relative to the static network.
    """
    right, costs = [], []
    dynamic = bool(graph_stages(model))
    with evaluating(model):
        for batch in batches:
            counts = batch.sample_mask > 0
            if dynamic:
                with recording(model) as recorder:
                    logits = model(batch.images)
                channels, height, width = batch.images.shape[1:]
                counted = count_costs(model, (channels, height, width))
                costs.append(recorded_cost(model, recorder, counted)[counts])
            else:
                logits = model(batch.images)
                costs.append(torch.ones(int(counts.sum())))
            right.append((logits.argmax(1) == batch.labels)[counts])
    return 100 * torch.cat(right).double().mean().item(), torch.cat(costs)


def at_thresholds(model: nn.Module, thresholds: Sequence[float], refit: Sequence[Tensor]) -> dict[str, nn.Module]:
    """Copy a network for every threshold, each with norms of its own; the network itself is the point ``learned``.

    Args:
        refit: images over which the statistics of norms are estimated; without any they stay.
    """
    found = {LEARNED: model}
    for threshold in thresholds:
        found[str(threshold)] = copy.deepcopy(model)
        dg_timm.set_threshold(found[str(threshold)], threshold)
        if refit:
            refit_norms(found[str(threshold)], refit)
    return found


def measure_curve(
    models: Mapping[str, nn.Module],
    static: nn.Module,
    batches: Sequence[Batch],
    *,
    time_batch: Sequence[int] = (),
    rounds: int = 7,
) -> list[Row]:
    """Measure every network of :func:`at_thresholds`; they are in sparse execution afterwards.

    Args:
        models: by the name of their operating point.
        static: the network that times are relative to.
        batches: to evaluate on.
        time_batch: batch sizes; each is timed on its first eight batches, and on at least 32 images.
        rounds: how often each network is timed.

    Returns:
        a row for each network: threshold, top1 (percent), cost, the standard deviation of the cost between images
        (spread), and the columns of :func:`dg_timm.training.run.timing.time_columns`.

    Raises:
        BadValue: for a batch size above the number of images.
    """
    rows: list[Row] = []
    for threshold, model in tqdm(models.items(), desc="accuracy and cost", unit="threshold", disable=None):
        dg_timm.set_execution(model, "dense")
        top1, costs = predict(model, batches)
        dg_timm.set_execution(model, "sparse")
        mean, spread = costs.mean().item(), costs.std(unbiased=False).item()
        rows.append(dict(threshold=threshold, top1=round(top1, 3), cost=round(mean, 4), spread=round(spread, 4)))
    images = torch.cat([batch.images for batch in batches])
    for size in tqdm(time_batch, desc="times", unit="batch size", disable=None if time_batch else True):
        some = images[: max(_LEAST_TIMED, _TIMED_BATCHES * size)]
        if len(some) < size:
            raise BadValue(f"a batch of {size} can't be timed with {len(some)} images")
        found = time_ratios(static, list(models.values()), some, size, rounds)
        for row, timing in zip(rows, found, strict=True):
            row |= time_columns(size, timing)
    return rows


def make_static(model: nn.Module) -> nn.Module:
    """Make the static network that a dynamic one is relative to, with random weights and in eval mode."""
    name = model.pretrained_cfg["architecture"].removeprefix("dg_")  # type: ignore[index, union-attr]
    return timm.create_model(name, num_classes=model.num_classes, in_chans=model.in_chans).eval()


def best_within(rows: Sequence[Row], target: float, keys: Sequence[str]) -> Row:
    """Find the most accurate row among those that keep to a budget in every one of ``keys``.

    Raises:
        BadValue: if there is none, naming the least that there is.
    """
    fits = [row for row in rows if all(row[key] <= target for key in keys)]
    if not fits:
        least = min(max(row[key] for key in keys) for row in rows)
        raise BadValue(f"no threshold of the curve keeps to {target:g}; the least is {least:g}")
    return max(fits, key=lambda row: float(row["top1"]))


def save_at(model: nn.Module, folder: Path, made: Mapping[str, str]) -> None:
    """Save a network whose threshold in force becomes its learned one; ``made`` is for the card."""
    dg_timm.set_execution(model, "dense")
    for router in routers(model).values():
        if router.fixed_threshold is not None:
            router.threshold.data.fill_(router.fixed_threshold)
    dg_timm.set_threshold(model, None)
    dg_timm.save_pretrained(model, folder, card=dg_timm.Card(made=dict(made)))


def _timed(row: Row) -> list[str]:
    return [key for key in row if key.startswith("time_") and key.count("_") == 1]


def curve_table(rows: Sequence[Row]) -> str:
    """Write the rows of :func:`measure_curve` in Markdown, with the quartiles of times in brackets."""
    times = _timed(rows[0])
    titles = ["threshold", "top-1 (%)", "cost", "spread"]
    titles += [f"time, batch {key.removeprefix('time_')}" for key in times]
    cells = [
        [row["threshold"], f"{row['top1']:.2f}", f"{row['cost']:.3f}", f"{row['spread']:.3f}"]
        + [f"{row[key]:.2f} ({row[f'{key}_low']:.2f} to {row[f'{key}_high']:.2f})" for key in times]
        for row in rows
    ]
    return markdown_table(titles, cells)


def draw_curve(rows: Sequence[Row], path: Path) -> None:
    """Draw top-1 over cost, and over every time, as a PNG (needs ``dg-timm[plots]``)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = ["cost", *_timed(rows[0])]
    figure = Figure(figsize=(4 * len(keys), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        fixed = sorted((row for row in rows if row["threshold"] != LEARNED), key=lambda row: row[key])
        axes.plot([row[key] for row in fixed], [row["top1"] for row in fixed], "o-", label="one threshold")
        for row in rows:
            if row["threshold"] == LEARNED:
                axes.plot(row[key], row["top1"], "s", label="learned thresholds")
        axes.set_xlabel("cost" if key == "cost" else f"time, batch {key.removeprefix('time_')}")
        axes.set_ylabel("top-1 (%)")
        axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)
