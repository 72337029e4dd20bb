"""Tables of a run as CSV files, each replaced as a whole."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dg_timm._files import atomic_path


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with a column for every key of any row; a row without a key has an empty cell there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(file: Path) -> list[dict[str, int | float | str]]:
    """Read a table that :func:`write_csv` wrote, without its empty cells; no rows if there is no such file."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        return [{key: _number(value) for key, value in row.items() if value != ""} for row in csv.DictReader(stream)]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
