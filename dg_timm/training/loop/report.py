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
    """The figure that a run is to improve: its name in tables, and its title in words."""

    name: str
    title: str


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
    """Draw loss, metric and learning rate over the run as a PNG; nothing, if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    loss, quality, rate = figure.subplots(1, 3)
    at = [row["update"] for row in updates]
    loss.plot(at, [row["loss"] for row in updates], linewidth=0.8, color="0.7", label="training")
    for name, axes in (("loss", loss), (metric.name, quality)):
        for prefix in ("eval", "ema"):
            points = [(r["updates"], r[f"{prefix}_{name}"]) for r in epochs if f"{prefix}_{name}" in r]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=prefix)
    if epochs and f"train_{metric.name}" in epochs[0]:
        points = [(r["updates"], r[f"train_{metric.name}"]) for r in epochs]
        quality.plot(*zip(*points, strict=True), color="0.7", label="training")
    rate.plot(at, [row["lr"] for row in updates], color="0.3")
    for axes, title in ((loss, "loss"), (quality, metric.title), (rate, "learning rate")):
        axes.set_title(title)
        axes.set_xlabel("updates")
    for axes in (loss, quality):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    with atomic_path(file) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
