"""Labels: names of classes, rows whose label is no class, and a part of every class set aside."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from dg_timm._errors import BadValue

_MAX_SHOWN = 8


def name_classes(rows: Any, label: str, given: Sequence[str] | None, num_classes: int | None, source: str) -> list[str]:
    """Name every class: by the user's names, by those of the data set, or by what its labels are.

    Raises:
        BadValue: the user gives another number of names, or a stream does not tell.
    """
    feature = rows.features[label]
    if isinstance(feature, ClassLabel):
        if given is not None and len(given) != len(feature.names):
            raise BadValue(f"{len(given)} label names for the {len(feature.names)} classes of {source}")
        return list(given or feature.names)
    if given is not None:
        return list(given)
    if isinstance(rows, IterableDataset) and num_classes is not None:
        return [str(k) for k in range(num_classes)]
    if isinstance(rows, IterableDataset):
        raise BadValue(
            f"column {label} of {source} is {feature}, which does not tell the classes of a stream; give --label-names "
            "(a file with a name a line) or --num-classes"
        )
    values = [value for value in rows.unique(label) if not _is_missing(value)]
    if values and isinstance(values[0], str):
        numbers = all(value.isdecimal() for value in values)
        return sorted(values, key=int) if numbers else sorted(values)
    return [str(k) for k in range(max(values, default=-1) + 1)]


def names_of_numbers(train: Any, test: Any, names: Sequence[str]) -> list[str] | None:
    """Return what the numbers of the split to evaluate on stand for; None where they have no names of their own.

    Args:
        train: the feature of the labels to train on.
        test: the feature of the labels to evaluate on.
        names: the classes to train on, by number; they may be other names than those of ``train``.

    Raises:
        BadValue: a class to evaluate on is none of those to train on.
    """
    if not isinstance(test, ClassLabel):
        return None
    own = train.names if isinstance(train, ClassLabel) else names
    renamed = dict(zip(own, names, strict=False))
    found = [renamed.get(name, name) for name in test.names]
    unknown = [name for name in found if name not in set(names)]
    if unknown:
        raise BadValue(
            f"the classes to evaluate on, {test.names[:_MAX_SHOWN]}, are not those to train on, "
            f"{list(own)[:_MAX_SHOWN]}: {unknown[:_MAX_SHOWN]} would never be learned"
        )
    return found


def find_labeled(values: Sequence[Any], names: Sequence[str], split: str, skip: bool) -> list[int] | None:
    """Return the rows whose label is a class; None where all rows are.

    Raises:
        BadValue: naming the first other row, unless ``skip``; and if there is no row with a class.
    """
    known, classes = set(names), len(names)
    bad = []
    for row, value in enumerate(values):
        good = value in known if isinstance(value, str) else isinstance(value, int) and 0 <= value < classes
        if not good or _is_missing(value):
            bad.append(row)
    if not bad:
        return None
    row, value = bad[0], values[bad[0]]
    if _is_missing(value):
        what = f"row {row} of {split} has no label"
    elif isinstance(value, str):
        what = f"label {value!r} at row {row} of {split} is no class of {list(names)[:_MAX_SHOWN]}"
    else:
        what = f"label {value} at row {row} of {split} is outside 0..{classes - 1}"
    if not skip or len(bad) == len(values):
        more = f"; {len(bad) - 1} more rows are of no class" if len(bad) > 1 else ""
        raise BadValue(f"{what}{more}" + ("" if skip else " (--on-bad-image skip leaves them out)"))
    return sorted(set(range(len(values))) - set(bad))


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def set_aside(labels: Sequence[Any], fraction: float, seed: int, source: str) -> tuple[list[int], list[int]]:
    """Choose a part of every class, at least one row; return the numbers of the other rows, and the chosen ones.

    Raises:
        BadValue: a class has a single row.
    """
    values, ids, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    if counts.min() < 2:
        raise BadValue(
            f"{source} has no split to evaluate on, and a class of a single image can't be split (label "
            f"{values[counts.argmin()]}): add images, or give --val-data"
        )
    if counts.min() * fraction < 1:  # too few for shares of a whole
        random = np.random.default_rng(seed)
        aside = np.concatenate(
            [random.permutation(np.flatnonzero(ids == k))[: max(1, round(fraction * count))]
             for k, count in enumerate(counts)]
        )  # fmt: skip
        return np.setdiff1d(np.arange(len(ids)), aside).tolist(), np.sort(aside).tolist()
    features = Features({"row": Value("int64"), "label": ClassLabel(num_classes=len(values))})
    table = Dataset.from_dict({"row": list(range(len(ids))), "label": ids.tolist()}, features=features)
    halves = table.train_test_split(fraction, stratify_by_column="label", seed=seed)
    return list(halves["train"]["row"]), list(halves["test"]["row"])
