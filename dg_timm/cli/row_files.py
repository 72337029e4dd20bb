"""Write rows to a file as they come: CSV, JSON or Parquet, in one step once all are there.

A list in a row is one in JSON, and a text with | between its items elsewhere.
"""

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from dg_timm._errors import BadValue, MissingPackage
from dg_timm._files import atomic_path
from dg_timm.training.data.label_forms import SEPARATOR

Row = dict[str, Any]
Write = Callable[[Sequence[Row]], None]


def _flat(row: Row) -> Row:
    return {key: SEPARATOR.join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}


@contextlib.contextmanager
def _csv_rows(file: Path) -> Iterator[Write]:
    with file.open("w", encoding="utf-8", newline="") as stream:
        yield csv_writer(stream)


def csv_writer(stream: IO[str]) -> Write:
    """Write rows to a stream as CSV, with the names of the columns before the first."""
    table = csv.writer(stream, lineterminator="\n")
    begun: list[bool] = []

    def write(rows: Sequence[Row]) -> None:
        if rows and not begun:
            begun.append(True)
            table.writerow(rows[0])
        table.writerows(_flat(row).values() for row in rows)

    return write


def json_lines(stream: IO[str]) -> Write:
    """Write rows to a stream, one JSON object a line."""
    return lambda rows: stream.writelines(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def _json_rows(file: Path) -> Iterator[Write]:
    """A list of objects, one a line."""
    with file.open("w", encoding="utf-8") as stream:
        before = ["[\n"]

        def write(rows: Sequence[Row]) -> None:
            for row in rows:
                stream.write(before[0] + json.dumps(row))
                before[0] = ",\n"

        yield write
        stream.write("[]\n" if before[0] == "[\n" else "\n]\n")


@contextlib.contextmanager
def _parquet_rows(file: Path) -> Iterator[Write]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackage("Parquet files need pyarrow: pip install 'dg-timm[train]'") from error
    with contextlib.ExitStack() as stack:
        opened: list[Any] = []

        def write(rows: Sequence[Row]) -> None:
            if not rows:
                return
            table = pyarrow.Table.from_pylist([_flat(row) for row in rows])
            if not opened:
                opened.append(stack.enter_context(parquet.ParquetWriter(file, table.schema)))
            opened[0].write_table(table)

        yield write


FORMATS = {".csv": _csv_rows, ".json": _json_rows, ".parquet": _parquet_rows}


def row_file(text: str) -> Path:
    """Read a name of a file whose suffix is one of ``FORMATS``.

    Raises:
        BadValue: for another suffix.
    """
    path = Path(text)
    if path.suffix.lower() not in FORMATS:
        raise BadValue(f"--output {text}: the name must end with {', '.join(FORMATS)}")
    return path


@contextlib.contextmanager
def open_rows(path: Path | None, *, as_json: bool = False) -> Iterator[Write]:
    """Give the function that writes rows; a file is in its place once the block has ended without an exception.

    Args:
        path: of the file; None writes to the standard output.
        as_json: write JSON lines there, in place of CSV.
    """
    if path is None:
        yield json_lines(sys.stdout) if as_json else csv_writer(sys.stdout)
        return
    with atomic_path(path) as temporary, FORMATS[path.suffix.lower()](temporary) as write:
        yield write
