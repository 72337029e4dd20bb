"""The splits of a data set: which rows are learned, which are held out, and what their labels stand for."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from datasets import IterableDataset

from dg_timm._errors import BadValue
from dg_timm.training.data.label_forms import LabelForm

TRAIN_SPLITS = ("train", "training")
HELD_OUT_SPLITS = ("validation", "val", "valid", "test")  # a Hub test split often has no labels
_SAME = {"val": "validation", "validation": "val"}

Rows = TypeVar("Rows")


class Split(NamedTuple):
    """One split of a data set.

    Attributes:
        rows: a ``datasets.Dataset``, or an ``IterableDataset`` if streamed, with the columns ``image`` (undecoded) and
            ``label`` (int, or str for the name of a class; several of them, or a number for each class).
        name: for messages, e.g. ``the training split of digits``.
        size: number of rows; None where only reading the whole stream would tell.
        source_rows: (size,) the rows' numbers in the data set, where some rows were left out.
        classes: what the numbers in ``label`` stand for; None where they have no names.
        form: how labels are written.
    """

    rows: Any
    name: str
    size: int | None
    source_rows: Any | None = None
    classes: Sequence[str] | None = None
    form: LabelForm = LabelForm()

    @property
    def streamed(self) -> bool:
        """Whether rows are read one after the other, without an index."""
        return isinstance(self.rows, IterableDataset)

    def source_row(self, row: int) -> int:
        """Return the number in the data set of a row of this split."""
        return row if self.source_rows is None else int(self.source_rows[row])

    def select(self, rows: Sequence[int], name: str | None = None) -> "Split":
        """Return a split of these rows only."""
        source_rows = np.asarray([self.source_row(row) for row in rows], dtype=np.int64)
        return self._replace(
            rows=self.rows.select(rows), name=name or self.name, size=len(rows), source_rows=source_rows
        )

    def name_row(self, row: int, image: Any, shard: int | None = None) -> str:
        """Name a row for people: its number in the data set, its shard in a stream, and its file where it is known."""
        number = f"row {self.source_row(row)}" if shard is None else f"row {row} of shard {shard}"
        path = image.get("path") if isinstance(image, dict) else None
        return f"{number} of {self.name}" + (f" ({path})" if path else "")


class Splits(NamedTuple):
    """The split to train on, the one to evaluate on, and a name for each class.

    Attributes:
        train: without rows where a data set is only evaluated and has nothing to train on.
        test: the rows to evaluate on; none of them is in ``train``.
        label_names: one name for each class.
        left_out: a remark for everything that the source has and that no split holds.
        remarks: on what the splits hold.
    """

    train: Split
    test: Split
    label_names: list[str]
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def find_split(
    parts: Mapping[str, Any], asked: str | None, usual: Sequence[str], source: str, option: str
) -> str | None:
    """Return the name of the split that was asked for, or else of the first usual one; None if there is no usual one.

    Raises:
        BadValue: if there is no split of the name that was asked for.
    """
    if asked is None:
        return next((name for name in usual if name in parts), None)
    for name in (asked, _SAME.get(asked, asked)):
        if name in parts:
            return name
    raise BadValue(f"{option} {asked}: {source} has no such split; it has {', '.join(parts) or 'none'}")


def pick_split(parts: Mapping[str, Rows], asked: str | None, usual: Sequence[str], source: str, option: str) -> Any:
    """Return the rows of the split that :func:`find_split` finds; None if there is none."""
    name = find_split(parts, asked, usual, source, option)
    return None if name is None else parts[name]


def count_rows(split: Split) -> int:
    """Count the rows of a split; a stream of unknown size is read once, without its images."""
    return split.size if split.size is not None else sum(1 for _ in split.rows.select_columns(["label"]))
