"""Measure trained networks at many operating points: the curves of budgets.py."""

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import dg_timm
from dg_timm._errors import BadState
from dg_timm._files import atomic_path
from dg_timm._hardware import describe_hardware
from dg_timm._tables import markdown_table
from dg_timm.analysis.counting import complexity
from dg_timm.budget.norms import refit_norms
from dg_timm.experiments.trial import Result
from dg_timm.training.run import networks, operating_points
from dg_timm.training.run.timing import time_columns, time_ratios

DEEPEST = "cifar_resnet26"
DYNAMIC = f"dg_{DEEPEST}"
SKIP = "skip"
NAMES = (DYNAMIC, DEEPEST, "cifar_resnet20", "cifar_resnet14", SKIP)
TIMED = (1, 32)  # batch sizes
MIN_TOP1_SHOWN = 50.0  # percent; a point below is not drawn
_SMALL = "-16px"  # end of the names of trials that others start from
_MOST_SKIPPED = 3  # blocks of each stage
_REFIT_IMAGES = 1024
_LEAST_TIMED, _TIMED_BATCHES = 64, 8
Row = dict[str, Any]


def without_last(model: nn.Module, blocks: int) -> nn.Module:
    """Take the last blocks off each stage of a static network, in place; return it."""
    for name in ("layer1", "layer2", "layer3"):
        children = list(model.get_submodule(name).children())
        setattr(model, name, nn.Sequential(*children[: len(children) - blocks]))
    return model


def calibrate_options(data: str) -> argparse.Namespace:
    """Give the options of calibrate.py for the data of this experiment."""
    parser = argparse.ArgumentParser()
    operating_points.add_options(parser)
    return parser.parse_args(["--data", data, "--refit-norms", str(_REFIT_IMAGES)])


def measure_networks(results: Sequence[Result], args: argparse.Namespace) -> list[Row]:
    """Measure every network at each of its operating points.

    Args:
        results: of finished trials.
        args: options of budgets.py.

    Returns:
        rows with ``network``, ``point``, ``top1`` (of the network as it was trained, where it runs like that),
        ``refitted`` (top-1 with the statistics of norms estimated over training images without augmentation, which
        alone is worth half a point to all networks), ``cost`` and its ``spread`` between images, and times relative to
        the deepest static network.

    Raises:
        BadState: if a network was deleted.
    """
    found = [result for result in results if not result.trial.name.endswith(_SMALL)]
    gone = [result.trial.name for result in found if not result.network.exists()]
    if gone or not found:
        raise BadState(f"networks are not in {args.output}: {', '.join(gone) or 'any'}; run without --collect")
    loaded = {result.trial.name: networks.create(str(result.network)).eval() for result in found}
    static = loaded.get(DEEPEST) or networks.create(DEEPEST).eval()
    options = argparse.Namespace(**vars(calibrate_options(args.data)), model=DEEPEST)
    batches, refit = operating_points.load_batches(options, static)
    channels, height, width = batches[0].images.shape[1:]
    size = (channels, height, width)
    whole = complexity(static, size).convolutions
    models = _operating_points(loaded, batches[0].images, args.points)
    rows: list[Row] = []
    for (name, point), model in models.items():
        as_trained = point in ("", operating_points.LEARNED)
        top1 = round(operating_points.predict(model, batches)[0], 2) if as_trained else ""
        refit_norms(refitted := copy.deepcopy(model), refit)
        top1_refitted, costs = operating_points.predict(refitted, batches)
        cost = costs.mean().item()
        if name.startswith(DYNAMIC):
            dg_timm.set_execution(model, "sparse")
        else:
            cost = complexity(model, size).convolutions / whole
        spread = costs.std(unbiased=False).item()
        rows.append({"network": name, "point": point, "top1": top1, "refitted": round(top1_refitted, 2),
                     "cost": round(cost, 4), "spread": round(spread, 4)})  # fmt: skip
    images = torch.cat([batch.images for batch in batches])
    for batch_size in TIMED:
        some = images[: max(_LEAST_TIMED, _TIMED_BATCHES * batch_size)]
        timings = time_ratios(static, list(models.values()), some, batch_size, args.rounds)
        for row, timing in zip(rows, timings, strict=True):
            row |= time_columns(batch_size, timing)
    return [row | {"time_rounds": args.rounds, "time_hardware": describe_hardware()} for row in rows]


def _operating_points(
    loaded: Mapping[str, nn.Module], images: torch.Tensor, points: int
) -> dict[tuple[str, str], nn.Module]:
    """List the networks by name and operating point: a threshold, or how many blocks of a stage are skipped."""
    found: dict[tuple[str, str], nn.Module] = {}
    for name, model in loaded.items():
        if name.startswith(DYNAMIC):
            thresholds = operating_points.thresholds_of(model, images, points)
            at_thresholds = operating_points.at_thresholds(model, thresholds, [])
            found |= {(name, point): own for point, own in at_thresholds.items()}
        elif name == SKIP:
            for blocks in range(_MOST_SKIPPED + 1):
                found[name, f"{blocks} a stage" if blocks else ""] = without_last(copy.deepcopy(model), blocks)
        else:
            found[name, ""] = model
    return found


def curves_table(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Write the rows in Markdown, with how long the trainings took."""
    header = ["network", "operating point", "top-1 (%)", "norms refitted", "cost", "spread",
              "time, batch 1 (quartiles)", "32"]  # fmt: skip
    lines = [
        [row["network"], row["point"], row["top1"], row["refitted"], f"{row['cost']:.3f}", f"{row['spread']:.3f}"]
        + [f"{row[f'time_{b}']:.2f} ({row[f'time_{b}_low']:.2f} to {row[f'time_{b}_high']:.2f})" for b in TIMED]
        for row in rows
    ]
    minutes = ", ".join(
        f"{sum(r.seconds for r in results if r.hardware == on) / 60:.0f} minutes ({on})"
        for on in dict.fromkeys(r.hardware for r in results)
    )
    measured = f"Training took {minutes} over all trials; measured on {describe_hardware()}."
    return f"{markdown_table(header, lines)}\n\n{measured}\n"


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draw top-1 over cost and over both times, as a PNG."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    dynamic = [row for row in rows if str(row["network"]).startswith(DYNAMIC)]
    lines = {
        "dynamic, as learned": [row for row in dynamic if row["point"] == operating_points.LEARNED],
        "static, by depth": [row for row in rows if row["network"] in NAMES and row["network"] != SKIP],
        "static, trained longer": [row for row in rows if row["network"] == f"{DEEPEST}-longer"],
        "stochastic depth, last blocks skipped": [row for row in rows if row["network"] == SKIP],
    }
    for name in dict.fromkeys(str(row["network"]) for row in dynamic):
        own = [row for row in dynamic if row["network"] == name and row["point"] != operating_points.LEARNED]
        lines[f"learned at {name.removeprefix(f'{DYNAMIC}-')}, other thresholds"] = own
    panels = {"cost": "cost", "time_1": "time, batch 1", "time_32": "time, batch 32"}
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for label, found in lines.items():
            shown = sorted((row for row in found if row["refitted"] > MIN_TOP1_SHOWN), key=lambda row: float(row[key]))
            axes.plot([row[key] for row in shown], [row["refitted"] for row in shown], "o-", label=label)
        axes.set_xlabel(f"{title} / {DEEPEST}'s")
        axes.set_ylabel("top-1 (%), norms refitted")
    axes.legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
