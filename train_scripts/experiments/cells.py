"""Cells of an experiment: each is a run of train.py in a folder of its own, done once and never again.

What was interrupted goes on from its last checkpoint; what is finished is read. Cells run side by side, one thread each.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from dg_timm.training.report import hardware

TRAIN = Path(__file__).parents[1] / "train.py"
RESULT = "cell.json"


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        name: of its folder; the seed is appended.
        options: of train.py, without dashes; None leaves one out.
        seed: of weights, order and augmentation.
        start: the cell whose network it starts from, of the same seed unless that one has a seed of its own.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    start: Optional["Cell"] = None

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.seed}"


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """What every experiment asks for."""
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder with it as Parquet, or uoft-cs/cifar10")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of the cells (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="folder of table and figure; by default that of the cells")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)), help="cells side by side")
    parser.add_argument("--collect", action="store_true", help="only read the cells that are finished")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=VALUE", help="overrides of every cell's options, e.g. epochs=1"
    )


def run(cells: Sequence[Cell], args: argparse.Namespace) -> list[tuple[Cell, dict[str, Any]]]:
    """Train what is not trained yet; of every finished cell, in order, its result (see :func:`read`).

    Raises:
        ValueError: if a folder holds a cell of other options.
        RuntimeError: naming the cells that failed, after all others are done.
    """
    overrides = dict(text.partition("=")[::2] for text in args.set)
    found: dict[str, Optional[dict[str, Any]]] = {cell.folder: read(cell, args, overrides) for cell in cells}
    waves: list[list[Cell]] = []
    for cell in cells:  # a cell comes after the one that it starts from
        depth = 0
        before = cell.start
        while before is not None:
            depth, before = depth + 1, before.start
        waves += [[] for _ in range(depth + 1 - len(waves))]
        waves[depth].append(cell)
    failed: list[str] = []
    if not args.collect:
        for wave in waves:
            with ThreadPoolExecutor(args.jobs) as pool:
                todo = [cell for cell in wave if found[cell.folder] is None]
                for cell, result in zip(todo, pool.map(lambda c: _train(c, args, overrides), todo), strict=True):
                    found[cell.folder] = result
                    failed += [] if result else [cell.folder]
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed; see log.txt in {args.output}")
    return [(cell, result) for cell in cells if (result := found[cell.folder]) is not None]


def read(cell: Cell, args: argparse.Namespace, overrides: Mapping[str, str]) -> Optional[dict[str, Any]]:
    """What a finished cell found: ``figures`` (the last row of its summary.csv), ``seconds``, ``hardware``, ``command``.

    None if it is not finished.
    """
    file = args.output / cell.folder / RESULT
    if not file.exists():
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    wanted = _options(cell, args, overrides)
    if result["options"] != wanted:
        differ = {k for k in {*wanted, *result["options"]} if wanted.get(k) != result["options"].get(k)}
        raise ValueError(
            f"{file.parent} holds a cell of other options ({', '.join(sorted(differ))}); give another --output"
        )
    return result


def _options(cell: Cell, args: argparse.Namespace, overrides: Mapping[str, str]) -> dict[str, str]:
    options = {**cell.options, **overrides, "seed": cell.seed}
    if cell.start is not None:
        options["initial-checkpoint"] = f"../{cell.start.folder}"
    return {key: _text(value) for key, value in options.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _train(cell: Cell, args: argparse.Namespace, overrides: Mapping[str, str]) -> Optional[dict[str, Any]]:
    folder = args.output / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    options = _options(cell, args, overrides)
    command = [sys.executable, str(TRAIN), "--data", args.data, "--output", str(folder / "run"), "--resume", "auto"]
    for key, value in options.items():
        if key == "initial-checkpoint":
            value = str(folder / value / "run" / "model")
        command += [f"--{key}", *([] if value == "True" else value.split())]
    began = time.time()
    with (folder / "log.txt").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    print(f"{cell.folder}: {'done' if status == 0 else f'failed ({status})'}, {time.time() - began:.0f} s", flush=True)
    if status != 0:
        return None
    with (folder / "run" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    timed = ("images_per_second", "train_seconds", "eval_seconds")
    result = {
        "options": options,
        "figures": {k: float(v) for k, v in rows[-1].items() if k not in timed and v != ""},
        "seconds": round(sum(float(r["train_seconds"]) + float(r["eval_seconds"]) for r in rows), 1),
        "hardware": hardware(),
    }
    beside = folder / f".{RESULT}"
    beside.write_text(json.dumps(result, indent=2) + "\n")
    beside.replace(folder / RESULT)
    return result


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a row a cell, and no times: the same cells give the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}")
    with beside.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(file)
