"""Cells of an experiment: each is a run of train.py in a folder of its own, done once and never again.

What was interrupted goes on from its last checkpoint. What a finished cell found is kept as JSON among the results, and
read from there; a cell is trained again only where another one, unfinished, needs its network. Cells run side by
side, one thread each, so that a cell gives the same figures wherever in the order it runs.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import yaml
from scipy import stats

from dg_timm.training.run.arguments import positive
from dg_timm.training.run.report import hardware, write_beside

SCRIPTS = Path(__file__).parents[2] / "train_scripts"
RESULTS = SCRIPTS.parent / "results" / "experiments"
_TIMED = ("images_per_second", "train_seconds", "eval_seconds")


@dataclass(frozen=True, eq=False)  # a cell is itself; options can not be hashed
class Cell:
    """One training.

    Attributes:
        name: of its folder; the seed is appended.
        options: of train.py, without dashes; of a Path only the name is kept among the results.
        seed: of weights, order and augmentation.
        networks: of other cells, by the option that takes one: ``initial-checkpoint``, ``distill``.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    networks: Mapping[str, "Cell"] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.seed}"


@dataclass(frozen=True)
class Result:
    """What a finished cell found.

    Attributes:
        cell: which.
        figures: the last row of its summary.csv.
        seconds: of training and evaluation.
        hardware: in words.
        network: folder of the network after the last epoch; it may be gone.
    """

    cell: Cell
    figures: Mapping[str, float]
    seconds: float
    hardware: str
    network: Path


def parse(
    parser: argparse.ArgumentParser, name: str, full: str, argv: Optional[Sequence[str]] = None
) -> argparse.Namespace:
    """Read the command line of an experiment, with what all of them ask for; ``full``: what its ``--full`` does."""
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder with it as Parquet, or uoft-cs/cifar10")
    parser.add_argument("--full", action="store_true", help=f"{full}; in folders of their own")
    parser.add_argument("--output", type=Path, help=f"of the runs (default: output/{name}, or {name}_full)")
    parser.add_argument(
        "--results", type=Path, help=f"of what is kept (default: {RESULTS.name}/{name}, or {name}_full)"
    )
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="cells side by side")
    parser.add_argument("--collect", action="store_true", help="train nothing: read the cells that are finished")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=VALUE", help="in place of every cell's, e.g. epochs=1"
    )
    args = parser.parse_args(argv)
    for text in args.set:
        if not re.fullmatch(r"[a-z][a-z-]*=.*", text):
            parser.error(f"--set {text}: give OPTION=VALUE, such as epochs=1")
    if len(set(getattr(args, "seeds", []))) < len(getattr(args, "seeds", [])):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: a seed stands twice")
    folder = f"{name}_full" if args.full else name
    args.output = args.output or Path("output") / folder
    args.results = args.results or RESULTS / folder
    for given in (args.output, args.results):
        if given.exists() and not given.is_dir():
            parser.error(f"{given} is no folder")
    return args


def guarded(main: Callable[[], int]) -> int:
    """Run a script's ``main``; what the user can mend ends in one line, not in a traceback."""
    try:
        return main()
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(cells: Sequence[Cell], args: argparse.Namespace, networks: bool = False) -> list[Result]:
    """Train what is not trained yet; of every finished cell, in order, its result.

    Args:
        networks: train finished cells again, too, whose networks are gone.

    Raises:
        ValueError: if results are those of other options, data or recipes, or two cells have one name.
        RuntimeError: naming the cells that failed, after all others are done that do not need them; what train.py
            refuses at once ends the experiment.
        SystemExit: after SIGTERM or SIGINT, once the trainings under way have stopped and saved.
    """
    bench = _Bench(args)
    if len({cell.folder for cell in cells}) != len(cells):
        raise ValueError("two cells have one name")
    wanted = networks and not args.collect
    needed = {cell for cell in cells if bench.read(cell) is None or (wanted and not bench.has_network(cell))}
    for cell in reversed(cells):  # a cell stands after those whose networks it takes
        if cell in needed:
            needed |= {other for other in cell.networks.values() if not bench.has_network(other)}
    wave = [] if args.collect else [cell for cell in cells if cell in needed]
    failed: dict[Cell, str] = {}
    with bench.listening():
        while wave:
            for cell in wave:
                lost = next((other for other in cell.networks.values() if other in failed), None)
                if lost is not None:
                    failed[cell] = f"needs {lost.folder}"
            wave = [cell for cell in wave if cell not in failed]
            ready = [cell for cell in wave if not any(other in wave for other in cell.networks.values())]
            with ThreadPoolExecutor(args.jobs) as pool:
                failed |= {c: why for c, why in zip(ready, pool.map(bench.train, ready), strict=True) if why}
            wave = [cell for cell in wave if cell not in ready]
    if failed:
        raise RuntimeError("; ".join(f"{cell.folder} {why}" for cell, why in failed.items()))
    return [result for cell in cells if (result := bench.read(cell)) is not None]


class _Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.overrides = dict(text.partition("=")[::2] for text in args.set)
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped_by: Optional[int] = None
        self.refused = False  # options or data that no cell can be trained with

    def network(self, cell: Cell) -> Path:
        path: Path = self.args.output / cell.folder / "run" / "checkpoints" / "last"
        return path

    def has_network(self, cell: Cell) -> bool:
        """Whether its training in this ``--output`` came to its end."""
        done = self.args.output / cell.folder / "finished.json"
        return done.exists() and json.loads(done.read_text()) == self.options(cell) and self.network(cell).exists()

    def options(self, cell: Cell) -> dict[str, Any]:
        """As they are kept: text, with the names of data and of the cells whose networks it takes, and the recipe."""
        options: dict[str, Any] = {key: _text(value) for key, value in self._given(cell).items()}
        data = options.get("data", self.args.data)
        options["data"] = Path(data).name if Path(data).exists() else data
        recipe = SCRIPTS / "recipes" / f"{options.get('recipe')}.yaml"
        if recipe.exists():
            options["of_recipe"] = yaml.safe_load(recipe.read_text())
        return options | {key: other.folder for key, other in cell.networks.items()}

    def _given(self, cell: Cell) -> dict[str, Any]:
        return {**cell.options, **self.overrides, "seed": cell.seed}

    def read(self, cell: Cell) -> Optional[Result]:
        file = self.args.results / f"{cell.folder}.json"
        if not file.exists():
            return None
        try:
            kept: dict[str, Any] = json.loads(file.read_text())
            now, then = self.options(cell), kept["options"]
            differ = sorted(key for key in {*now, *then} if now.get(key) != then.get(key))
            result = Result(cell, kept["figures"], kept["seconds"], kept["hardware"], self.network(cell))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is no result of a cell ({error!r}); move it away") from error
        if differ:
            shown = ", ".join(f"{key}: {then.get(key)} there, {now.get(key)} now" for key in differ)
            raise ValueError(f"{file} is of other options ({shown}); give another --results and --output")
        return result

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT reach the trainings, which save and end; then this process does."""

        def stop(number: int, frame: Any) -> None:
            self.stopped_by = number
            for process in tuple(self.running):
                if number == signal.SIGTERM:  # a terminal sends SIGINT to all of them itself
                    process.send_signal(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
            if self.stopped_by is not None:
                print("stopped; the same command goes on", file=sys.stderr)
                sys.exit(128 + self.stopped_by)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def train(self, cell: Cell) -> str:
        """Train to the end and keep the result; otherwise why not."""
        if self.stopped_by is not None or self.refused:
            return "was not started"
        folder: Path = self.args.output / cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "finished.json").unlink(missing_ok=True)
        options = self.options(cell)
        given = {k: str(v) if isinstance(v, Path) else _text(v) for k, v in self._given(cell).items()}
        given |= {key: str(self.network(other)) for key, other in cell.networks.items()}
        command = [sys.executable, str(SCRIPTS / "train.py"), "--data", self.args.data, "--output", str(folder / "run"),
                   "--resume", "auto"]  # fmt: skip
        for key, value in given.items():
            command += [
                f"--{key}",
                *([] if value == "True" else [value] if key in ("initial-checkpoint", "distill") else value.split()),
            ]
        print(f"{cell.folder} begins", flush=True)
        with (folder / "log.txt").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.running.add(process)
            status = process.wait()
            self.running.discard(process)
        if status != 0:
            self.refused = self.refused or (status == 2 and not (folder / "run" / "summary.csv").exists())
            said = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            print(f"{cell.folder} failed ({status})", flush=True)
            return f"failed ({status}): {said[0][:500]} (all of it: {folder / 'log.txt'})"
        with (folder / "run" / "summary.csv").open() as file:
            rows = list(csv.DictReader(file))
        figures = {key: float(value) for key, value in rows[-1].items() if key not in _TIMED and value != ""}
        seconds = round(sum(float(row["train_seconds"]) + float(row["eval_seconds"]) for row in rows), 1)
        before = self.read(cell)
        if before is not None:  # trained again for its network
            same = before.figures == figures
            print(f"{cell.folder}: {'as before' if same else 'NOT as before: other figures'}", flush=True)
        else:
            self.args.results.mkdir(parents=True, exist_ok=True)
            kept = {"options": options, "figures": figures, "seconds": seconds, "hardware": hardware()}
            write_beside(self.args.results / f"{cell.folder}.json", json.dumps(kept, indent=1) + "\n")
        write_beside(folder / "finished.json", json.dumps(options, indent=1) + "\n")
        print(f"{cell.folder}: top-1 {figures['eval_top1']:.2f} % after {seconds:.0f} s", flush=True)
        return ""


def _text(value: Any) -> str:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> tuple[float, float, float, int]:
    """Mean difference from ``base`` over the seeds of both, its 95 % interval (Student's t), and how many there are.

    The interval is NaN for fewer than two seeds.
    """
    differences = np.array([values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())])
    mean, n = float(differences.mean()), len(differences)
    if n < 2:
        return mean, float("nan"), float("nan"), n
    half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5)
    return mean, mean - half, mean + half, n
