"""How a data set writes the labels of a row, and the numbers that a loss takes.

A row has one class, any number of classes (names, or numbers of classes), or a number for each class.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dg_timm.hub.labeling import SINGLE, Labeling

SEPARATOR = "|"  # between the names in a text
SUM_TOLERANCE = 0.02  # shares are often rounded to two digits: 0.33 three times, 0.17 six times
_MAX_SHOWN = 8

Target = int | np.ndarray  # the number of a class; or (classes,) float32


class LabelForm(NamedTuple):
    """How the labels of a data set are written.

    Attributes:
        labeling: what they are for.
        kind: ``class``; ``classes`` (a list of them, or a text); or ``vector`` (a number for each class).
        width: how many numbers a vector has.
        separator: between the names in a text.
    """

    labeling: Labeling = SINGLE
    kind: str = "class"
    width: int = 0
    separator: str = SEPARATOR


class Encoder:
    """Turn the label of a row into what a loss takes: the number of a class, or (classes,) float32.

    Args:
        form: of the labels.
        own: what the numbers in the labels stand for; None where they are numbers of ``label_names``.
        label_names: one name for each class, in the order of the network's outputs.
    """

    def __init__(self, form: LabelForm, own: Sequence[str] | None, label_names: Sequence[str]) -> None:
        self.form, self.label_names = form, label_names
        self.class_of = {name: k for k, name in enumerate(label_names)}
        self.names = own if own is not None and list(own) != list(label_names) else None  # two classes may share a name
        if form.kind == "vector":
            self.places = [self._class(k) for k in range(form.width)]

    def __call__(self, label: Any) -> Target:
        """Encode a label.

        Raises:
            ValueError: it is none; the text says of the row what is wrong.
        """
        if self.form.kind == "class":
            return self._number(label)
        return self._vector(label) if self.form.kind == "vector" else self._several(label)

    def _class(self, label: Any) -> Any:
        """Return the number of a class; a label that is none as it is."""
        if self.names is not None and isinstance(label, int) and 0 <= label < len(self.names):
            label = self.names[label]
        return self.class_of.get(label, label) if isinstance(label, str) else label

    def _number(self, label: Any) -> int:
        found = self._class(label)
        if not isinstance(found, int) or not 0 <= found < len(self.label_names):
            raise ValueError(f"has the label {found!r}, outside 0..{len(self.label_names) - 1}")
        return found

    def _several(self, label: Any) -> np.ndarray:
        target = np.zeros(len(self.label_names), dtype=np.float32)
        for one in split_names(label, self.form.separator):
            found = self._class(one)
            if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < len(target):
                raise ValueError(f"has the label {found!r}, which is no class of {list(self.label_names)[:_MAX_SHOWN]}")
            target[found] = 1
        return target

    def _vector(self, label: Any) -> np.ndarray:
        values = [] if label is None else list(label)
        if len(values) != self.form.width:
            raise ValueError(f"has {len(values)} numbers for {self.form.width} classes")
        numbers = _read_numbers(values)
        several = self.form.labeling.task == "multilabel"
        good = np.isin(numbers, (0, 1)) if several else (numbers >= 0) & (numbers <= 1)
        if not good.all():
            at = int(np.flatnonzero(~good)[0])
            name, allowed = (self.names or self.label_names)[at], "0 or 1" if several else "a number from 0 to 1"
            raise ValueError(f"says {values[at]!r} of class {name!r}, and not {allowed}")
        if not self.form.labeling.independent and abs(numbers.sum() - 1) > SUM_TOLERANCE:
            raise ValueError(f"has shares that add up to {numbers.sum():.4g}, not to 1 (scores are for --loss bce)")
        target = np.zeros(len(self.label_names), dtype=np.float32)
        target[self.places] = numbers
        return target


def split_names(label: Any, separator: str) -> list[Any]:
    """Give the classes of a row one by one: the names in a text, or the items of a list; none of a missing label."""
    if isinstance(label, str):
        return [name.strip() for name in label.split(separator) if name.strip()]
    return [] if label is None else list(label)


def _read_numbers(values: Sequence[Any]) -> np.ndarray:
    """Read numbers, also those that a CSV has as texts: "0" is 0. What is none becomes nan, which no range allows."""
    try:
        return np.asarray(values, dtype=np.float64)  # None becomes nan
    except ValueError:
        return np.array([_read_number(value) for value in values])


def _read_number(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)
    except ValueError:
        return math.nan
