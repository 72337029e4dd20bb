"""What a run leaves to read: a line for every epoch, tables, options, environment, curves and trackers."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from accelerate import Accelerator

from dg_timm._errors import BadState
from dg_timm._files import atomic_path, atomic_write
from dg_timm.training.loop.csv_tables import read_csv, write_csv
from dg_timm.training.loop.environment import describe_environment

Row = dict[str, int | float | str]


class Metric(NamedTuple):
    """The figure that a run is to improve.

    Attributes:
        name: in tables.
        title: in words.
        pictured: name and title of what curves show in its place, or None.
        costs: aimed at, which curves show as lines.
    """

    name: str
    title: str
    pictured: tuple[str, str] | None = None
    costs: tuple[float, ...] = ()


TOP1 = Metric("top1", "top-1 (%)")
MAP = Metric("map", "mAP (%)")  # the mean over the classes of their average precision


class Report:
    """The files of a run's folder. Only the main process writes; the calls of the others do nothing.

    Rows are kept in memory and each file is replaced as a whole, so that it is never half-written and a resumed run can
    drop what lies after its checkpoint.

    Args:
        folder: of the run.
        accelerator: whose main process writes, and which has the trackers.
        metric: that the curves show.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, metric: Metric = TOP1) -> None:
        self.folder, self.accelerator, self.metric = folder, accelerator, metric
        self.epochs: list[Row] = []
        self.updates: list[Row] = []

    def begin(self, args: Mapping[str, Any], *, trackers: bool) -> None:
        """Write the options and the environment, and start the trackers.

        Raises:
            BadState: if the folder can't be written.
        """
        if self.accelerator.is_main_process:
            with self._writing():
                atomic_write(self.folder / "args.yaml", yaml.safe_dump(dict(args), sort_keys=False, allow_unicode=True))
                environment = json.dumps(describe_environment(self.accelerator), indent=1)
                atomic_write(self.folder / "environment.json", environment + "\n")
        if trackers:
            plain = (int, float, str, bool)
            flat = {key: value if isinstance(value, plain) else str(value) for key, value in args.items()}
            self.accelerator.init_trackers("dg_timm", config=flat)

    def resume(self, epochs: int, updates: int) -> None:
        """Read the rows of an earlier part of the run, up to these numbers of epochs and updates."""
        self.epochs = [row for row in read_csv(self.folder / "summary.csv") if int(row["epoch"]) <= epochs]
        self.updates = [row for row in read_csv(self.folder / "updates.csv") if int(row["update"]) <= updates]

    def add_update(self, row: Row) -> None:
        """Add a row to updates.csv (written with the next checkpoint or epoch) and to the trackers."""
        self.updates.append(row)
        if self.accelerator.is_main_process:
            numbers = {f"train/{key}": value for key, value in row.items() if key != "update"}
            self.accelerator.log(numbers, step=int(row["update"]))

    def add_epoch(self, row: Row) -> None:
        """Add a row to summary.csv and to the trackers, and draw the curves again."""
        self.epochs.append(row)
        if self.accelerator.is_main_process:
            numbers = {key: value for key, value in row.items() if not isinstance(value, str)}
            self.accelerator.log(numbers, step=int(row["updates"]))
            self.write_tables()
            with self._writing():
                draw_curves(self.epochs, self.updates, self.folder / "curves.png", self.metric)

    def write_tables(self) -> None:
        """Write summary.csv and updates.csv.

        Raises:
            BadState: if they can't be written.
        """
        if self.accelerator.is_main_process:
            with self._writing():
                write_csv(self.folder / "summary.csv", self.epochs)
                write_csv(self.folder / "updates.csv", self.updates)

    def line(self, text: str) -> None:
        """Print a line in the main process."""
        self.accelerator.print(text, flush=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BadState(f"the run's folder {self.folder} can't be written: {error}") from error


def draw_curves(epochs: list[Row], updates: list[Row], file: Path, metric: Metric) -> None:
    """Draw a run as a PNG: loss, metric, cost where the network is dynamic, and learning rate.

    Draws nothing, if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    name, title = metric.pictured or (metric.name, metric.title)
    priced = any("train_cost" in row for row in epochs)
    panels = {"loss": "loss", name: title, "cost": "cost of an image (static network: 1)"}
    panels = {key: title for key, title in panels.items() if _series(epochs, key)}
    figure = Figure(figsize=(4 * len(panels) + 4, 3.2), layout="constrained")
    *all_axes, rate = figure.subplots(1, len(panels) + 1)
    at = [row["update"] for row in updates]
    for axes, (key, title) in zip(all_axes, panels.items(), strict=True):
        if key == "loss":
            label = "training, with the price on cost" if priced else "training"
            axes.plot(at, [row["loss"] for row in updates], linewidth=0.8, color="0.7", label=label)
        elif any(f"train_{key}" in row for row in epochs):
            axes.plot(*_points(epochs, f"train_{key}"), color="0.7", label="training")
        for column, points in _series(epochs, key).items():
            axes.plot(*points, "o-", markersize=3, label=column)
        for cost in metric.costs if key == "cost" else ():
            axes.axhline(cost, color="0.3", linewidth=0.8, linestyle=":")
        axes.set_title(title)
        axes.legend()
    rate.plot(at, [row["lr"] for row in updates], color="0.3")
    rate.set_title("learning rate")
    for axes in (*all_axes, rate):
        axes.set_xlabel("updates")
    with atomic_path(file) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _series(epochs: list[Row], key: str) -> dict[str, tuple[list[Any], list[Any]]]:
    """Find a figure of the network and of its average, at every budget it was evaluated at, by what a legend says."""
    columns = dict.fromkeys(column for row in epochs for column in row)
    found = {}
    for column in columns:
        prefix, _, rest = column.partition("_")
        name, _, budget = rest.partition("@")
        if prefix in ("eval", "ema") and name == key:
            said = "average" if prefix == "ema" else "evaluation"
            found[f"{said}, budget {budget}" if budget else said] = _points(epochs, column)
    if key in columns and not found:  # of the statistics of a graph
        found["evaluation"] = _points(epochs, key)
    return found


def _points(epochs: list[Row], column: str) -> tuple[list[Any], list[Any]]:
    points = [(row["updates"], row[column]) for row in epochs if column in row]
    return [at for at, _ in points], [value for _, value in points]
