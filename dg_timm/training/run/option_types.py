"""Parts of a command line: flags, and types that say in a sentence what is allowed."""

import argparse
import contextlib
import math
from typing import Any, Protocol

import yaml


class OptionGroup(Protocol):
    """A parser or a group of its options: whatever has ``add_argument``."""

    def add_argument(self, *name_or_flags: str, **options: Any) -> argparse.Action:
        """Add an option."""
        ...


def flag(group: OptionGroup, name: str, default: bool | None, help: str) -> None:
    """Add ``--name`` and ``--no-name``."""
    action = group.add_argument(name, action=argparse.BooleanOptionalAction, default=default)
    action.help = help  # set afterwards: Python below 3.13 would add the default to it, as the formatter does


def positive_int(text: str) -> int:
    """Read an integer of at least 1."""
    return _integer(text, 1)


def non_negative_int(text: str) -> int:
    """Read an integer of at least 0."""
    return _integer(text, 0)


def fraction(text: str) -> float:
    """Read a number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def non_negative_float(text: str) -> float:
    """Read a finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def positive_float(text: str) -> float:
    """Read a finite number above 0."""
    value = non_negative_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def finite_float(text: str) -> float:
    """Read a finite number."""
    value = _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from error
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error


class KeyValues(argparse.Action):
    """Read ``--model-kwargs a=1 b=x`` as ``{"a": 1, "b": "x"}``; values are YAML scalars."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        """Store the pairs, or end with an error of the parser."""
        pairs = {}
        for text in values:
            key, equals, value = text.partition("=")
            if not equals or not key:
                parser.error(f"{option} takes key=value, got {text!r}")
            try:
                pairs[key] = _scalar(value)
            except yaml.YAMLError:
                parser.error(f"{option}: {text!r} has no valid value")
        setattr(namespace, self.dest, pairs)


def _scalar(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)  # YAML 1.1 reads 1e-8 as text
    return yaml.safe_load(text)
