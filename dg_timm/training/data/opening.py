"""Open a source of data as its splits by name, undecoded: folders, files, saved data sets, the Hub, digits."""

import glob
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import datasets
import fsspec

from dg_timm._errors import BadValue
from dg_timm.training.data import file_lists
from dg_timm.training.data.digits import open_digits
from dg_timm.training.data.folders import Tree, open_image_folder, read_tree
from dg_timm.training.data.splits import HELD_OUT_SPLITS, TRAIN_SPLITS

_MOST_SHARDS = 64  # of what is read as a stream although it has an index
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
# The names that writers of shards use: train.parquet, train-00000-of-00004.parquet, val_003.tar
_SHARD = re.compile(r"(train|val|validation|test)([-_.]\d[\w.-]*)?")
_MAX_SHOWN = 8


class Opened(NamedTuple):
    """What a source holds.

    Attributes:
        parts: a data set of ``datasets`` for every split, by name.
        left_out: a remark for everything that is in no split.
    """

    parts: dict[str, Any]
    left_out: list[str]


def open_source(
    source: str,
    streaming: bool,
    cache_dir: Path | None = None,
    asked: Collection[str] = (),
    image_key: str | None = None,
) -> Opened:
    """Open a source of :func:`dg_timm.training.data.sources.load_splits`.

    Args:
        source: its name or path.
        streaming: open data sets that are read one row after the other.
        cache_dir: folder for the copy that ``datasets`` makes.
        asked: names that the user says are splits.
        image_key: column of a table of files that names them.

    Raises:
        BadValue: naming the source, if there is no such source or it can't be read.
    """
    try:
        opened = _open(source, streaming, cache_dir, asked, image_key)
    except BadValue:
        raise
    except (ValueError, OSError, ImportError) as error:  # of datasets, which does not always name the source
        raise BadValue(_explain(source, error)) from error
    usual = [name for name in (*TRAIN_SPLITS, *HELD_OUT_SPLITS) if name in opened.parts]
    parts = {name: opened.parts[name] for name in dict.fromkeys([*usual, *opened.parts])}
    return opened._replace(parts={name: _as_stream(part) if streaming else part for name, part in parts.items()})


def _explain(source: str, error: Exception) -> str:
    if "://" in source:
        return f"{source} can't be read: {error}"
    if not Path(source).expanduser().exists():
        return f"{source} is neither a file or folder here nor a data set of the Hub that can be read: {error}"
    return str(error) if source in str(error) else f"{source} can't be read: {error}"


def _as_stream(part: Any) -> Any:
    if isinstance(part, datasets.IterableDataset):
        return part
    return part.to_iterable_dataset(num_shards=min(_MOST_SHARDS, max(len(part), 1)))


def _open(
    source: str, streaming: bool, cache_dir: Path | None, asked: Collection[str], image_key: str | None
) -> Opened:
    if source == "digits":
        return Opened({"train": open_digits()}, [])
    options: dict[str, Any] = dict(streaming=streaming, cache_dir=None if cache_dir is None else str(cache_dir))
    if "://" in source:
        return Opened(_load_addresses(source, options), [])
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, options, asked, image_key)
    if path.is_file():
        return _open_file(path, source, options, image_key)
    if source.startswith((".", "/", "~")):
        raise BadValue(f"no such folder: {source}; give a folder with a folder of images for each class")
    return Opened(dict(datasets.load_dataset(source, **options)), [])


def _open_file(path: Path, source: str, options: dict[str, Any], image_key: str | None) -> Opened:
    if path.suffix in file_lists.SUFFIXES:
        return Opened(dict(file_lists.open_list(path, image_key)), [])
    if path.suffix not in _BUILDERS:
        raise BadValue(f"{source} is neither a folder nor a .parquet, .tar or .csv file")
    return Opened(_load_shards(path.suffix, {"train": [path]}, options), [])


def _open_folder(path: Path, options: dict[str, Any], asked: Collection[str], image_key: str | None) -> Opened:
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        saved = datasets.load_from_disk(str(path))  # memory-mapped: nothing is copied
        return Opened(dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}, [])
    if _has_own_configuration(path):
        return Opened(dict(datasets.load_dataset(str(path), **options)), [])
    tree = read_tree(path)
    lists = file_lists.find_lists(path)
    if tree.has_images and lists:
        return Opened(*file_lists.open_lists(lists, tree, image_key))
    suffix = next((one for one in _BUILDERS if tree.side_files[f"{one} files"]), None)
    if suffix is not None and not tree.folders:
        others = [f"{len(tree.loose)} images beside the {suffix} files"] if tree.loose else []
        others += [f"{n} {kind}" for kind, n in tree.side_files.items() if kind != f"{suffix} files"]
        return Opened(_load_shards(suffix, _shards_by_split(path, suffix, asked), options), others)
    if tree.has_images:
        return Opened(*open_image_folder(tree, asked))
    return _open_otherwise(path, tree, options)


def _has_own_configuration(path: Path) -> bool:
    """Whether the folder is a copy of a data set of the Hub that says itself which files are which split."""
    card = path / "README.md"
    return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace").partition("\n---\n")[0]


def _open_otherwise(path: Path, tree: Tree, options: dict[str, Any]) -> Opened:
    if not tree.side_files:
        raise BadValue(f"{path} holds no files; give a folder with a folder of images for each class")
    try:
        return Opened(dict(datasets.load_dataset(str(path), **options)), [])
    except Exception as error:  # of a builder that datasets chose by the files' names
        have = ", ".join(f"{n} {kind}" for kind, n in tree.side_files.items())
        raise BadValue(f"{path} holds no images ({have}), and datasets can't read it: {error}") from error


def _shards_by_split(path: Path, suffix: str, asked: Collection[str]) -> dict[str, list[Path]]:
    """Sort shards by split: the folder of the first level, or else the file's whole name, decides.

    Raises:
        BadValue: some shards belong to a split, and others to none.
    """
    parts: dict[str, list[Path]] = {}
    others = []
    for file in sorted(path.rglob(f"*{suffix}")):
        inside = file.relative_to(path)
        if any(part.startswith(".") for part in inside.parts):
            continue
        top = inside.parts[0] if len(inside.parts) > 1 else ""
        named = _SHARD.fullmatch(file.stem)
        split = top if top in asked or _SHARD.fullmatch(top) else named[1] if named else None
        split = file.stem if split is None and file.stem in asked else split
        if split is None:
            others.append(inside)
        else:
            parts.setdefault(split, []).append(file)
    if parts and others:
        raise BadValue(
            f"{path} has the splits {', '.join(parts)}, and files that belong to none: "
            f"{', '.join(map(str, others[:_MAX_SHOWN]))}. Name a file of a split train-00000{suffix}, or put it into a "
            f"folder train, val, validation or test; or give one file as --data and another as --val-data"
        )
    return parts or {"train": [path / file for file in others]}


def _load_shards(suffix: str, parts: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Load every split by itself: together, all would be read with the columns and classes of the first one."""
    found: dict[str, Any] = {}
    for name, paths in parts.items():
        found |= datasets.load_dataset(_BUILDERS[suffix], data_files={name: _literal(paths)}, **options)
    return found


def _load_addresses(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load shards from object storage or a web server, by whatever fsspec has for the address.

    Raises:
        BadValue: for other files, and for an address with a secret: a run writes its options down.
    """
    address = urlsplit(source)
    suffix = Path(address.path).suffix
    if address.password or address.query:
        raise BadValue(
            f"{address.scheme}://{address.hostname}{address.path} is given with a password or a query, which would be "
            "written into args.yaml: let the environment hold what gives access"
        )
    if suffix not in _BUILDERS:
        raise BadValue(f"{source} names no .parquet or .tar files: give e.g. s3://bucket/train-*.tar")
    if not fsspec.get_fs_token_paths(source)[2]:
        raise BadValue(f"{source} matches no file")
    return dict(datasets.load_dataset(_BUILDERS[suffix], data_files={"train": [source]}, **options))


def _literal(paths: Iterable[Path]) -> list[str]:
    """Write paths as patterns that match nothing else."""
    return [glob.escape(str(path)) for path in paths]
