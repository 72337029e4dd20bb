"""Real digits with several labels each: whether they are even, have a loop, or are below five."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.helpers.files import DIGITS, png

NAMES = ("even", "looped", "small")
_LOOPED = {0, 6, 8, 9}


def classes_of(k: int) -> list[str]:
    """The classes of digit ``k``; those of 5 and 7 are none."""
    digit = int(DIGITS.target[k])
    return [name for name, has in zip(NAMES, (digit % 2 == 0, digit in _LOOPED, digit < 5), strict=True) if has]


def shares_of(k: int) -> list[float]:
    """A distribution over the three classes: equal shares of those of the digit, and of all where it has none."""
    own = classes_of(k) or list(NAMES)
    return [(name in own) / len(own) for name in NAMES]


def labeled_csv(
    folder: Path, rows: Sequence[int], columns: Callable[[int], dict[str, object]], name: str = "a.csv"
) -> Path:
    """A CSV of these digits, beside their PNG files, with further columns; a ``.jsonl`` name makes JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    table = []
    for k in rows:
        (folder / f"{k}.png").write_bytes(png(k))
        table.append({"file_name": f"{k}.png", **columns(k)})
    file = folder / name
    with file.open("w", encoding="utf-8", newline="") as stream:
        if file.suffix == ".jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in table)
        else:
            writer = csv.DictWriter(stream, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return file


def joined(k: int) -> dict[str, object]:
    """The names of a digit's classes in one column."""
    return {"labels": "|".join(classes_of(k))}


def flags(k: int) -> dict[str, object]:
    """A column of 0 and 1 for each class."""
    return {name: int(name in classes_of(k)) for name in NAMES}
