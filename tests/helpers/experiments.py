"""Trainings that take no time, for tests of what runs them."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dg_timm.experiments.launcher import Launcher
from dg_timm.experiments.options import make_parser, parse
from dg_timm.experiments.store import TrialStore
from dg_timm.training.loop.csv_tables import write_csv


class FakeLauncher(Launcher):
    """Takes the place of trainings: each writes the summary of a run, and no network is trained.

    Args:
        top1: of every training.
        status: gives the exit status of a training by its folder; by default all succeed.

    Attributes:
        commands: that were started, in order.
    """

    def __init__(self, top1: float = 50.0, status: Callable[[str], int] = lambda folder: 0) -> None:
        super().__init__()
        self.top1, self.status = top1, status
        self.commands: list[list[str]] = []

    @property
    def started(self) -> list[str]:
        """Folders of the trials that were started, in order."""
        return [Path(command[command.index("--output") + 1]).parent.name for command in self.commands]

    def run(self, command: Sequence[str], log: Path) -> int:
        """Write what a training would leave; return the status that was asked for."""
        self.commands.append(list(command))
        run = Path(command[command.index("--output") + 1])
        status = self.status(run.parent.name)
        log.write_text(f"epoch 1\nthe end of {run.parent.name}\n", encoding="utf-8")
        if status == 0:
            (run / "checkpoints" / "last").mkdir(parents=True, exist_ok=True)
            write_csv(run / "summary.csv", [dict(epoch=k, eval_top1=self.top1, train_seconds=1.0, eval_seconds=0.5,
                                                 images_per_second=9.0, eval_top5="") for k in (1, 2)])  # fmt: skip
        return status

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Leave the signals of the tests' process alone."""
        yield


def experiment_options(folder: Path, *more: str):
    """Parse the options of an experiment over digits, with its folders below ``folder``."""
    given = ["--data", "digits", "--output", f"{folder}/out", "--results", f"{folder}/kept", *more]
    return parse(make_parser(None), "x", "more", given)


def keep_result(args, trial, **changed) -> None:
    """Keep a result of a trial, as if it were trained; ``changed`` are options that it had."""
    options = {**TrialStore(args).options(trial), **changed}
    kept = {"options": options, "figures": {"eval_top1": 50.0 + trial.seed}, "seconds": 1.0, "hardware": "none"}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{trial.folder}.json").write_text(json.dumps(kept), encoding="utf-8")
