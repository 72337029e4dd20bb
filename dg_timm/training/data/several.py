"""Rows of any number of classes, or of a number for each: their names, and what is wrong with which row."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import IterableDataset, List

from dg_timm._errors import BadValue
from dg_timm.training.data.columns import Asked, Columns
from dg_timm.training.data.label_forms import SEPARATOR, Encoder, split_names
from dg_timm.training.data.labels import names_of_numbers
from dg_timm.training.data.splits import Split

_MAX_SHOWN = 8


def name_several(rows: Any, columns: Columns, given: Sequence[str] | None, asked: Asked, source: str) -> list[str]:
    """Name every class: by the user's names, by those of the data set, or by what its labels are.

    Args:
        rows: of ``datasets``, before their columns were renamed.
        columns: of labels.
        given: names by the user, who says ``asked`` of the columns.
        source: of the rows, for messages.

    Raises:
        BadValue: the user gives another number of names, the labels are hardly names, or a stream does not tell.
    """
    form = columns.form
    own: list[str] | None = None if columns.known is None else list(columns.known.names)
    if form.kind == "vector":
        own = list(columns.labels) if len(columns.labels) > 1 else [str(k) for k in range(form.width)]
    if own is not None:
        if given is not None and len(given) != len(own):
            raise BadValue(f"{len(given)} label names for the {len(own)} classes of {source}")
        return list(given or own)
    (name,) = columns.labels
    if isinstance(rows, IterableDataset):
        if given is not None:
            return list(given)
        raise BadValue(
            f"column {name} of {source} does not tell the classes of a stream; give --label-names (a file with a name "
            "a line)"
        )
    labels = rows.select_columns([name])[:][name]
    if asked.separator is None:
        _require_separator([label for label in labels if isinstance(label, str) and label.strip()], name, source)
    found = given or sorted({str(one) for label in labels for one in split_names(label, form.separator)})
    if not found:
        raise BadValue(f"no row of {source} has a label in column {name}")
    if set(found) <= {"0", "1"} and isinstance(rows.features[name], List):
        raise BadValue(f"column {name} of {source} has the texts '0' and '1' where numbers belong; save it as numbers")
    return list(found)


def names_to_evaluate(
    columns: Columns, trained: Columns, names: Sequence[str], own: Sequence[str] | None, source: str
) -> Sequence[str] | None:
    """Return what the numbers in the labels to evaluate on stand for; None where they have no names of their own.

    Args:
        columns: of the rows to evaluate on.
        trained: of those to train on.
        names: the classes to train on, by number; they may be other names than those of ``trained``.
        own: what the numbers to train on stand for; None where they have no names.
        source: of the rows to evaluate on, for messages.

    Raises:
        BadValue: a class to evaluate on is none of those to train on.
    """
    if columns.form.kind != "vector":
        return names_of_numbers(trained.known, columns.known, names)
    if len(columns.labels) == 1 or columns.labels == trained.labels:
        if columns.form.width != len(names):
            raise BadValue(f"the rows of {source} have {columns.form.width} numbers for {len(names)} classes")
        return own
    unknown = [name for name in columns.labels if name not in set(names)]
    if unknown:
        raise BadValue(f"the classes {unknown} to evaluate on are none of those to train on; name the columns of "
                       "classes with --label-key")  # fmt: skip
    return columns.labels


def _require_separator(texts: Sequence[str], name: str, source: str) -> None:
    """Refuse texts none of which has the usual separator: "a b" would silently be the name of a class."""
    if texts and not any(SEPARATOR in text for text in texts):
        raise BadValue(
            f"no row of column {name} of {source} has the character {SEPARATOR!r} between labels, e.g. {texts[0]!r}; "
            "name the one that it has with --label-separator"
        )


class Checked(NamedTuple):
    """What the labels of a split hold.

    Attributes:
        good: the rows whose labels can be read; None where all can.
        empty: how many rows have no class.
        per_class: (classes,) float64, sums over the rows.
    """

    good: list[int] | None
    empty: int
    per_class: np.ndarray


def check_several(split: Split, names: Sequence[str], skip: bool) -> Checked:
    """Encode the labels of all rows of an indexed split, and say what is wrong with the first that can't be.

    Args:
        split: with an index.
        names: one for each class.
        skip: leave such rows out.

    Raises:
        BadValue: naming the first such row and its file, unless ``skip``; and if there is no other row.
    """
    encode = Encoder(split.form, split.classes, names)
    bad: dict[int, str] = {}
    empty, sums = 0, np.zeros(len(names))
    for row, label in enumerate(_labels(split)):
        try:
            target = encode(label)
        except ValueError as error:
            bad[row] = str(error)
            continue
        empty += not np.any(target)
        sums += target
    if bad and (not skip or len(bad) == split.size):
        row, reason = next(iter(bad.items()))
        more = f"; {len(bad) - 1} more rows can't be read" if len(bad) > 1 else ""
        advice = "" if skip else " (--on-bad-image skip leaves them out)"
        raise BadValue(f"{split.name_row(row, split.rows[row]['image'])} {reason}{more}{advice}")
    good = sorted(set(range(split.size or 0)) - set(bad)) if bad else None
    return Checked(good, empty, sums)


def describe_labels(train: Split, test: Split, names: Sequence[str]) -> list[str]:
    """Say of indexed splits how many images have no class, and which classes no image to evaluate on has.

    Raises:
        BadValue: there is no other class, and so no mean over them.
    """
    indexed = [split for split in (train, test) if not split.streamed and split.size]
    found = [check_several(split, names, skip=True) for split in indexed]
    remarks = [
        f"{of_split.empty} images of {split.name} are of no class"
        for split, of_split in zip(indexed, found, strict=True)
        if of_split.empty
    ]
    if test not in indexed:
        return remarks
    unseen = [name for name, count in zip(names, found[-1].per_class, strict=True) if not count]
    if len(unseen) == len(names):
        raise BadValue(f"no image of {test.name} has a label, so that there is no mAP; give others with --val-data")
    shown = ", ".join(unseen[:_MAX_SHOWN]) + (", ..." if len(unseen) > _MAX_SHOWN else "")
    if unseen:
        remarks.append(f"mAP leaves out {len(unseen)} classes that no image of {test.name} has ({shown})")
    return remarks


def _labels(split: Split) -> Iterator[Any]:
    yield from split.rows.select_columns(["label"])[:]["label"]


def set_aside_rows(size: int, fraction: float, seed: int, source: str) -> tuple[list[int], list[int]]:
    """Choose a part of the rows at random, at least one; return the numbers of the others, and the chosen ones.

    Raises:
        BadValue: there is a single row.
    """
    if size < 2:
        raise BadValue(f"{source} has a single row, which can't be split: add images, or give --val-data")
    order = np.random.default_rng(seed).permutation(size)
    count = max(1, round(fraction * size))
    return sorted(order[count:].tolist()), sorted(order[:count].tolist())
