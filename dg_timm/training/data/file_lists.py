"""Tables that name image files and their labels: a CSV given as data, or metadata files in a folder of images.

``metadata.csv``, ``metadata.jsonl`` and ``metadata.parquet``, with a column ``file_name``, are what ``datasets`` calls
an image folder with metadata. A column ``split`` says which split a row belongs to.
"""

import os
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, Image

from dg_timm._errors import BadValue
from dg_timm.training.data.folders import SPLIT_FOLDERS, Tree

SUFFIXES = (".csv", ".tsv")
_IN_FOLDERS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_FILE_COLUMNS = ("file_name", "filename", "image", "image_path", "path", "file")


def find_lists(folder: Path) -> dict[str, Path]:
    """Find the metadata files of a folder of images, by the split that they list: those of its splits, or its own."""
    found = {name: _list_in(folder / name) for name in SPLIT_FOLDERS}
    inside = {name: file for name, file in found.items() if file is not None}
    own = _list_in(folder)
    return inside or ({} if own is None else {"train": own})


def _list_in(folder: Path) -> Path | None:
    return next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)


def open_lists(lists: dict[str, Path], tree: Tree, image_key: str | None) -> tuple[dict[str, Any], list[str]]:
    """Open metadata files; count the images of the folder that none of them names, and the files beside.

    Raises:
        BadValue: as :func:`open_list`.
    """
    parts: dict[str, Any] = {}
    for name, file in lists.items():
        opened = open_list(file, image_key)
        parts |= {name: opened["train"]} if set(opened) == {"train"} else opened
    listed = {os.path.realpath(row["path"]) for part in parts.values() for row in _undecoded(part) if row["path"]}
    images = [*tree.loose, *(path for files in tree.folders.values() for path in files)]
    missing = sum(os.path.realpath(path) not in listed for path in images)
    counts = tree.side_files.copy()
    counts.subtract(f"{file.suffix} files" for file in lists.values())
    remarks = [f"{missing} images that no metadata file names"] if missing else []
    return parts, [*remarks, *(f"{n} {kind}" for kind, n in counts.items() if n)]


def _undecoded(part: Dataset) -> Any:
    return part.select_columns(["image"]).cast_column("image", Image(decode=False))[:]["image"]


def open_list(file: Path, image_key: str | None) -> dict[str, Dataset]:
    """Open a table of image files; paths in it are relative to its folder.

    Args:
        file: a CSV, TSV, JSON-lines or Parquet file.
        image_key: name of the column of file names; by default one of the usual ones.

    Returns:
        its rows by split, with a column ``image``, undecoded, and all others.

    Raises:
        BadValue: the table can't be read, has no column of file names, or none of its files exists.
    """
    table = _read(file)
    key = image_key or next((name for name in _FILE_COLUMNS if name in table.columns), None)
    if key not in table.columns:
        option = f"--image-key {image_key}: " if image_key else ""
        raise BadValue(f"{option}{file} has no column of file names; its columns are {', '.join(map(str, table))}")
    names = [name if isinstance(name, str) and name else None for name in table.pop(key)]
    paths = [None if name is None else os.path.join(file.parent, name) for name in names]
    if not any(path is not None and os.path.isfile(path) for path in paths):
        raise BadValue(f"{file} names no file that exists: {names[:1]} was looked for in {file.parent}")
    table["image"] = paths
    if "split" not in table.columns:
        return {"train": _as_data_set(table)}
    empty = sum(not str(name).strip() for name in table["split"].fillna(""))
    if empty:
        raise BadValue(f"{empty} rows of {file} have no split; name one for each row, or leave the column out")
    return {str(name): _as_data_set(rows.drop(columns="split")) for name, rows in table.groupby("split", sort=False)}


def _as_data_set(table: pd.DataFrame) -> Dataset:
    return Dataset.from_pandas(table, preserve_index=False).cast_column("image", Image())


def _read(file: Path) -> pd.DataFrame:
    """Read a table; in a CSV, ``NA`` and ``None`` are texts, and ``007`` is not a number."""
    try:
        if file.suffix == ".parquet":
            return pd.read_parquet(file)
        if file.suffix == ".jsonl":
            return pd.read_json(file, lines=True, dtype=False)
        separator = "\t" if file.suffix == ".tsv" else ","
        table = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except Exception as error:  # whatever the parsers raise
        raise BadValue(f"{file} can't be read: {error}") from error
    for name in table.columns:
        if all(value.isdecimal() and str(int(value)) == value for value in table[name]):
            table[name] = table[name].astype("int64")
    return table
