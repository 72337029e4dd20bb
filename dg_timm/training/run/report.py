"""What a run leaves to read: a line an epoch, tables, options, environment, curves, trackers."""

import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn

from dg_timm.analysis.counting import relative_cost
from dg_timm.analysis.recorder import adjacency
from dg_timm.graph.stage import graph_stages

Row = dict[str, Union[int, float, str]]


class Metric(NamedTuple):
    """The figure that a run is to improve: its name in tables, and its title in words."""

    name: str
    title: str


TOP1 = Metric("top1", "top-1 (%)")
_PACKAGES = ("torch", "timm", "dg-timm", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy")


class Report:
    """The files of a run's folder. Only the main process writes; the others' calls do nothing.

    Rows are kept in memory and the file is replaced as a whole, so that it is never half-written and a resumed run can
    drop what lies after its checkpoint.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, metric: Metric = TOP1) -> None:
        self.folder, self.accelerator, self.metric = folder, accelerator, metric
        self.epochs: list[Row] = []
        self.updates: list[Row] = []

    def begin(self, args: Mapping[str, Any], *, trackers: bool) -> None:
        """Write what is known before the first step."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_beside(self.folder / "args.yaml", yaml.safe_dump(dict(args), sort_keys=False))
            write_beside(self.folder / "environment.json", json.dumps(environment(self.accelerator), indent=1) + "\n")
        if trackers:
            flat = {
                key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in args.items()
            }
            self.accelerator.init_trackers("dg_timm", config=flat)

    def resume(self, epochs: int, updates: int) -> None:
        """Read the rows of an earlier part of the run, up to these epochs and updates."""
        self.epochs = [row for row in _read_csv(self.folder / "summary.csv") if int(row["epoch"]) <= epochs]
        self.updates = [row for row in _read_csv(self.folder / "updates.csv") if int(row["update"]) <= updates]

    def add_update(self, row: Row) -> None:
        """A row of updates.csv (written with the next checkpoint or epoch) and of the trackers."""
        self.updates.append(row)
        if self.accelerator.is_main_process:
            self.accelerator.log(
                {f"train/{key}": value for key, value in row.items() if key != "update"}, step=int(row["update"])
            )

    def add_epoch(self, row: Row) -> None:
        """A row of summary.csv and of the trackers; the curves are drawn anew."""
        self.epochs.append(row)
        if self.accelerator.is_main_process:
            numbers = {key: value for key, value in row.items() if not isinstance(value, str)}
            self.accelerator.log(numbers, step=int(row["updates"]))
            self.write_tables()
            draw_curves(self.epochs, self.updates, self.folder / "curves.png", self.metric)

    def write_tables(self) -> None:
        """Write summary.csv and updates.csv."""
        if self.accelerator.is_main_process:
            write_csv(self.folder / "summary.csv", self.epochs)
            write_csv(self.folder / "updates.csv", self.updates)

    def line(self, text: str) -> None:
        """Print once."""
        self.accelerator.print(text, flush=True)


def graph_statistics(model: nn.Module, images: Tensor) -> Row:
    """Mean open weight and open fraction of every stage, and the mean cost relative to the static network."""
    if not graph_stages(model):
        return {}
    alphas = adjacency(model, images)
    row: Row = {}
    for name, alpha in alphas.items():
        n = alpha.shape[-1]
        upper = torch.triu_indices(n, n, 1, device=alpha.device)
        edges = alpha[:, upper[0], upper[1]].float()
        row[f"{name}.weight"] = round(edges.mean().item(), 5)
        row[f"{name}.open"] = round((edges != 0).float().mean().item(), 5)
    row["cost"] = round(
        relative_cost(model, alphas, (images.shape[1], images.shape[2], images.shape[3])).mean().item(), 5
    )
    return row


def hardware() -> str:
    """The device in words, for a card."""
    if torch.accelerator.is_available() and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, commit, hardware and command; nothing of the environment's variables, which may hold secrets."""
    cuda = accelerator.device.type == "cuda"
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(accelerator.device) if cuda else str(accelerator.device),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def _commit() -> str:
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude",
        "*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def draw_curves(epochs: list[Row], updates: list[Row], file: Path, metric: Metric) -> None:
    """Loss, metric and learning rate over the run; nothing, if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    loss, quality, rate = figure.subplots(1, 3)
    loss.plot(
        [r["update"] for r in updates], [r["loss"] for r in updates], linewidth=0.8, color="0.7", label="training"
    )
    for name, axis, style in (("loss", loss, "o-"), (metric.name, quality, "o-")):
        for prefix in ("eval", "ema"):
            points = [(r["updates"], r[f"{prefix}_{name}"]) for r in epochs if f"{prefix}_{name}" in r]
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=3, label=prefix)
    if epochs and f"train_{metric.name}" in epochs[0]:
        points = [(r["updates"], r[f"train_{metric.name}"]) for r in epochs]
        quality.plot(*zip(*points, strict=True), color="0.7", label="training")
    rate.plot([r["update"] for r in updates], [r["lr"] for r in updates], color="0.3")
    for axis, title in ((loss, "loss"), (quality, metric.title), (rate, "learning rate")):
        axis.set_title(title)
        axis.set_xlabel("updates")
    for axis in (loss, quality):
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    beside = file.with_name(f".{file.name}")
    FigureCanvasAgg(figure).print_png(str(beside))
    os.replace(beside, file)


def write_beside(file: Path, text: str) -> None:
    """Write text beside its place and rename it."""
    beside = file.with_name(f".{file.name}")
    beside.write_text(text)
    os.replace(beside, file)


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a column for every key of any row; the file is replaced as a whole."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    beside = file.with_name(f".{file.name}")
    with beside.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, file)


def _read_csv(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return [{key: _number(value) for key, value in row.items() if value != ""} for row in csv.DictReader(stream)]


def _number(text: str) -> Union[int, float, str]:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
