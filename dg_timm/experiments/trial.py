"""A trial of an experiment: one training, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, eq=False)  # a trial equals itself alone; its options can't be hashed
class Trial:
    """One run of train.py.

    Attributes:
        name: of its folder, to which the seed is appended.
        options: of train.py, without dashes. Of a Path only the name is kept among the results.
        seed: of weights, order and augmentation.
        depends_on: trials whose networks it takes, by the option that takes one: ``initial-checkpoint``, ``distill``.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    depends_on: Mapping[str, "Trial"] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of its folder, and of its file among the results."""
        return f"{self.name}-{self.seed}"


@dataclass(frozen=True)
class Result:
    """What came of a finished trial.

    Attributes:
        trial: which one.
        figures: the last row of its summary.csv.
        seconds: that training and evaluation took.
        hardware: on which it ran, in words.
        network: folder of the network after the last epoch; it may have been deleted.
    """

    trial: Trial
    figures: Mapping[str, float]
    seconds: float
    hardware: str
    network: Path


def option_text(value: Any) -> str:
    """Write the value of an option as it is kept among the results: words, without folders."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return " ".join(f"{key}={one}" for key, one in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def option_words(key: str, value: Any) -> list[str]:
    """Write an option as words of a command line."""
    if value is True or value == "True":
        return [f"--{key}"]
    if isinstance(value, Path):
        return [f"--{key}", str(value)]
    return [f"--{key}", *option_text(value).split()]
