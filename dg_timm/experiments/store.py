"""What experiments keep: results as JSON, and the networks that trials trained."""

import argparse
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dg_timm._errors import BadValue
from dg_timm._files import atomic_write
from dg_timm.cli.train import RECIPES
from dg_timm.experiments.trial import Result, Trial, option_text

_TIMED = ("images_per_second", "train_seconds", "eval_seconds")


class TrialStore:
    """Finds and keeps the results and networks of trials.

    Args:
        args: options of :func:`dg_timm.experiments.options.parse`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.data: str = args.data
        self.output: Path = args.output
        self.results: Path = args.results
        self.overrides = dict(text.partition("=")[::2] for text in args.set)

    def folder(self, trial: Trial) -> Path:
        """Folder of a trial: its log, and in ``run`` what train.py writes."""
        return self.output / trial.folder

    def network(self, trial: Trial) -> Path:
        """Folder of a trial's network after the last epoch; it may not exist."""
        return self.folder(trial) / "run" / "checkpoints" / "last"

    def has_network(self, trial: Trial) -> bool:
        """Whether a training of this trial, with these options, came to its end in this ``--output``."""
        done = self.folder(trial) / "finished.json"
        return done.exists() and _read_json(done) == self.options(trial) and self.network(trial).exists()

    def given(self, trial: Trial) -> dict[str, Any]:
        """Options of train.py for a trial, but for data, folders, and the networks that it takes."""
        return {**trial.options, **self.overrides, "seed": trial.seed}

    def options(self, trial: Trial) -> dict[str, Any]:
        """Options as they are kept: text, with the names of data and trials in place of folders, and the recipe."""
        options: dict[str, Any] = {key: option_text(value) for key, value in self.given(trial).items()}
        data = options.get("data", self.data)
        options["data"] = Path(data).name if Path(data).exists() else data
        recipe = RECIPES / f"{options.get('recipe')}.yaml"
        if recipe.exists():
            options["of_recipe"] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        return options | {key: other.folder for key, other in trial.depends_on.items()}

    def read(self, trial: Trial) -> Result | None:
        """Read the result of a trial; None if there is none.

        Raises:
            BadValue: if the file is not a result, or one of other options, data or recipe.
        """
        file = self.results / f"{trial.folder}.json"
        if not file.exists():
            return None
        try:
            kept: dict[str, Any] = _read_json(file)
            now, then = self.options(trial), kept["options"]
            differ = sorted(key for key in {*now, *then} if now.get(key) != then.get(key))
            result = Result(trial, kept["figures"], kept["seconds"], kept["hardware"], self.network(trial))
        except (KeyError, TypeError, ValueError) as error:
            raise BadValue(f"{file} is not a result of a trial ({error!r}); move it away") from error
        if differ:
            shown = ", ".join(f"{key}: {then.get(key)} there, {now.get(key)} now" for key in differ)
            raise BadValue(f"{file} is of other options ({shown}); give another --results and --output")
        return result

    def begin(self, trial: Trial) -> Path:
        """Make the folder of a trial that is about to be trained; it counts as unfinished from now on."""
        folder = self.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "finished.json").unlink(missing_ok=True)
        return folder

    def finish(self, trial: Trial, hardware: str) -> tuple[Result, bool | None]:
        """Keep what a trial gave, unless its result is kept already.

        Args:
            trial: whose training came to its end.
            hardware: on which it ran, in words.

        Returns:
            the new result, and whether it has the figures of the one that was kept before; None if there was none.
        """
        with (self.folder(trial) / "run" / "summary.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        figures = {key: float(value) for key, value in rows[-1].items() if key not in _TIMED and value != ""}
        seconds = round(sum(float(row["train_seconds"]) + float(row["eval_seconds"]) for row in rows), 1)
        options, before = self.options(trial), self.read(trial)
        if before is None:
            kept = {"options": options, "figures": figures, "seconds": seconds, "hardware": hardware}
            _write_json(self.results / f"{trial.folder}.json", kept)
        _write_json(self.folder(trial) / "finished.json", options)
        result = Result(trial, figures, seconds, hardware, self.network(trial))
        return result, None if before is None else before.figures == figures


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    atomic_write(file, json.dumps(content, indent=1) + "\n")
