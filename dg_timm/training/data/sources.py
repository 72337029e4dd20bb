"""Open labeled images: data sets of the Hugging Face Hub, local ones in its formats, and the digits of scikit-learn.

Rows come out undecoded (``{"bytes", "path"}``): the loader's workers decode them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from dg_timm._errors import BadValue
from dg_timm.training.data.digits import open_digits

TRAIN_SPLITS = ("train", "training")
HELD_OUT_SPLITS = ("validation", "val", "valid", "test")  # a Hub test split often has no labels
_MAX_SHOWN = 8
_MOST_SHARDS = 64  # of a saved data set that is read as a stream


class Split(NamedTuple):
    """One split of a data set.

    Attributes:
        rows: a ``datasets.Dataset``, or an ``IterableDataset`` if streamed, with the columns ``image`` (undecoded) and
            ``label`` (int, or str if label names must be applied).
        name: for messages, e.g. ``the training split of digits``.
        size: number of rows; None where only reading the whole stream would tell.
        source_rows: (size,) the rows' numbers in the data set, where some rows were left out.
    """

    rows: Any
    name: str
    size: int | None
    source_rows: Any | None = None

    @property
    def streamed(self) -> bool:
        """Whether rows are read one after the other, without an index."""
        return isinstance(self.rows, IterableDataset)

    def source_row(self, row: int) -> int:
        """Return the number in the data set of a row of this split."""
        return row if self.source_rows is None else int(self.source_rows[row])

    def select(self, rows: Sequence[int], name: str | None = None) -> "Split":
        """Return a split of these rows only."""
        source_rows = np.asarray([self.source_row(row) for row in rows])
        return Split(self.rows.select(rows), name or self.name, len(rows), source_rows)


class Splits(NamedTuple):
    """The split to train on, the one to evaluate on, and a name for each class."""

    train: Split
    test: Split
    label_names: list[str]


def load_splits(
    source: str,
    *,
    val_source: str | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    label_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    streaming: bool = False,
    test_fraction: float = 0.2,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> Splits:
    """Load a data set for classification.

    Args:
        source: ``digits`` (scikit-learn's 1,797 handwritten digits, 8 x 8); a folder (of images, with a folder for
            each class, optionally below train/ and validation/ or test/; of Parquet files; of webdataset shards; or
            saved by ``save_to_disk``); a Parquet or tar file; or the name of a data set on the Hub.
        val_source: another data set to evaluate on; by default a split of ``source``.
        train_split, val_split: names of the splits; by default train, and validation or else test.
        image_key, label_key: names of the columns; by default the image column, and the ClassLabel column.
        label_names: one name for each class, where the data set has none.
        num_classes: number of classes, where labels are integers and a stream does not tell how many there are.
        streaming: read rows as they are needed instead of copying the data set to the disk first.
        test_fraction: share of every class that is set aside where there is no split to evaluate on.
        seed: of that choice.
        cache_dir: folder for the copy that ``datasets`` makes; by default its own cache.

    Raises:
        BadValue: for a path that does not exist, and for a split, column or label names that are missing, empty, or
            out of range.
    """
    train_rows, val_rows = _open_both(source, val_source, train_split, val_split, streaming, cache_dir)
    image, label = _columns(train_rows, image_key, label_key, source)
    names = _label_names(train_rows, label, label_names, num_classes, source)
    train = _split(train_rows, image, label, names, f"the training split of {source}")
    if val_rows is None:
        if streaming:
            raise BadValue(
                f"{source} has no {' or '.join(HELD_OUT_SPLITS)} split; name one with --val-split or --val-data"
            )
        kept, aside = _set_aside(train_rows, label, test_fraction, seed, source)
        held_out = f"{100 * test_fraction:.0f} % of {source}, set aside"
        return Splits(train.select(kept), train.select(aside, held_out), names)
    val_source = val_source or source
    val_image, val_label = _columns(val_rows, image_key or image, label_key or label, val_source)
    _check_same_classes(train_rows.features[label], val_rows.features[val_label])
    return Splits(train, _split(val_rows, val_image, val_label, names, f"the evaluation split of {val_source}"), names)


def _open_both(
    source: str,
    val_source: str | None,
    train_split: str | None,
    val_split: str | None,
    streaming: bool,
    cache_dir: Path | None,
) -> tuple[Any, Any]:
    """Open the rows to train on, and those to evaluate on; None for the latter if the source has no split for it."""
    parts = load_parts(source, streaming, cache_dir)
    train_rows = pick_split(parts, train_split, TRAIN_SPLITS, source, "--train-split")
    if train_rows is None:
        if len(parts) > 1:
            raise BadValue(f"{source} has no split named train, only {', '.join(parts)}; choose with --train-split")
        train_rows = next(iter(parts.values()))
    if val_source is not None:
        others = load_parts(val_source, streaming, cache_dir)
        val_rows = pick_split(others, val_split, HELD_OUT_SPLITS, val_source, "--val-split")
        val_rows = val_rows or next(iter(others.values()))
    else:
        val_rows = pick_split(parts, val_split, HELD_OUT_SPLITS, source, "--val-split")
    return train_rows, val_rows


def load_parts(source: str, streaming: bool, cache_dir: Path | None = None) -> dict[str, Any]:
    """Open a source of :func:`load_splits`; return its splits by name, as ``datasets`` gives them.

    Raises:
        BadValue: naming the source, if there is no such source or it can't be read.
    """
    try:
        return _open(source, streaming, cache_dir)
    except BadValue:
        raise
    except (ValueError, OSError) as error:  # of datasets, which does not always name the source
        raise BadValue(str(error) if source in str(error) else f"{source} can't be read: {error}") from error


def _open(source: str, streaming: bool, cache_dir: Path | None) -> dict[str, Any]:
    if source == "digits":
        return {"train": open_digits()}
    options: dict[str, Any] = dict(streaming=streaming, cache_dir=None if cache_dir is None else str(cache_dir))
    path = Path(source).expanduser()
    if path.is_file():
        kind = {".parquet": "parquet", ".tar": "webdataset"}.get(path.suffix)
        if kind is None:
            raise BadValue(f"{source} is neither a folder nor a .parquet or .tar file")
        return dict(datasets.load_dataset(kind, data_files={"train": str(path)}, **options))
    if not path.is_dir():
        if source.startswith((".", "/", "~")):
            raise BadValue(f"no such folder: {source}; give a folder with a folder of images for each class")
        return dict(datasets.load_dataset(source, **options))
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        saved = datasets.load_from_disk(str(path))  # memory-mapped: nothing is copied
        parts = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        if streaming:
            shards = {name: min(_MOST_SHARDS, max(len(part), 1)) for name, part in parts.items()}
            parts = {name: part.to_iterable_dataset(num_shards=shards[name]) for name, part in parts.items()}
        return parts
    return dict(datasets.load_dataset(str(path), **options))


def pick_split(parts: dict[str, Any], asked: str | None, usual: Sequence[str], source: str, option: str) -> Any:
    """Return the split that was asked for, or else the first usual one; None if there is no usual one.

    Raises:
        BadValue: if there is no split of the name that was asked for.
    """
    if asked is not None and asked not in parts:
        raise BadValue(f"{option} {asked}: {source} has no such split; it has {', '.join(parts)}")
    return parts.get(asked) if asked else next((parts[name] for name in usual if name in parts), None)


def _columns(rows: Any, image_key: str | None, label_key: str | None, source: str) -> tuple[str, str]:
    """Find the columns of images and of labels."""
    features = dict(rows.features or {})
    have = ", ".join(f"{name} ({feature})" for name, feature in features.items()) or "none"
    for key, option in ((image_key, "--image-key"), (label_key, "--label-key")):
        if key is not None and key not in features:
            raise BadValue(f"{option} {key}: {source} has no such column; its columns are {have}")
    image = image_key or _prefer([k for k, f in features.items() if isinstance(f, Image)], "image")
    if image is None or not isinstance(features[image], Image):
        raise BadValue(f"{source} has no image column{' ' + image if image else ''}; its columns are {have}")
    label = label_key or _prefer([k for k, f in features.items() if isinstance(f, ClassLabel)], "label")
    label = label or next((k for k in ("label", "cls") if k in features), None)  # cls: webdataset's usual name
    if label is None:
        raise BadValue(f"{source} has no label column; name one with --label-key. Its columns are {have}")
    kind = features[label]
    is_label = isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "str"))
    if not isinstance(kind, ClassLabel) and not is_label:
        raise BadValue(f"column {label} of {source} is {kind}; labels must be integers or text")
    return image, label


def _prefer(names: list[str], preferred: str) -> str | None:
    return preferred if preferred in names else next(iter(names), None)


def _check_same_classes(train: Any, test: Any) -> None:
    if isinstance(train, ClassLabel) and isinstance(test, ClassLabel) and train.names != test.names:
        raise BadValue(
            f"the classes to evaluate on, {test.names[:_MAX_SHOWN]}, are not those to train on, "
            f"{train.names[:_MAX_SHOWN]}"
        )


def _label_names(rows: Any, label: str, given: Sequence[str] | None, num_classes: int | None, source: str) -> list[str]:
    """Name every class: by the user's names, by those of the data set, or by what its labels are."""
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
    values = [value for value in rows.unique(label) if value is not None]
    if values and isinstance(values[0], str):
        return sorted(values)
    return [str(k) for k in range(max(values, default=-1) + 1)]


def _set_aside(rows: Any, label: str, fraction: float, seed: int, source: str) -> tuple[list[int], list[int]]:
    """Choose a part of every class; return the numbers of the other rows, and those of the chosen ones."""
    labels = rows.select_columns([label])[:][label]
    if labels and min(np.unique(labels, return_counts=True)[1]) < 2:
        raise BadValue(
            f"{source} has no split to evaluate on, and a class of a single image can't be split; add images"
        )
    ids = {value: k for k, value in enumerate(sorted(set(labels)))}
    features = Features({"row": Value("int64"), "label": ClassLabel(num_classes=len(ids))})
    table = {"row": list(range(len(labels))), "label": [ids[value] for value in labels]}
    halves = Dataset.from_dict(table, features=features).train_test_split(
        fraction, stratify_by_column="label", seed=seed
    )
    return list(halves["train"]["row"]), list(halves["test"]["row"])


def _split(rows: Any, image: str, label: str, names: list[str], name: str) -> Split:
    """Make a split of two columns; refuse labels that are no class, where that can be told without reading a stream."""
    if isinstance(rows, IterableDataset):
        # First of all: what follows would decode every image here, and encode it again with a loss.
        rows = rows.cast_column(image, Image(decode=False))
        rows = rows.reshard()  # Parquet: a shard for each row group instead of one for each file
    rows = rows.select_columns([image, label])
    rows = rows.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
    if isinstance(rows, IterableDataset):
        known = (rows.info.splits or {}).get(str(rows.split)) if rows.split else None
        return Split(rows, name, known.num_examples if known and known.num_examples else None)
    if len(rows) == 0:
        raise BadValue(f"{name} is empty")
    _check_labels(rows.select_columns(["label"])[:]["label"], names, name)
    return Split(rows.cast_column("image", Image(decode=False)), name, len(rows))


def _check_labels(values: list[Any], names: list[str], split: str) -> None:
    if None in values:
        raise BadValue(f"row {values.index(None)} of {split} has no label")
    if isinstance(values[0], str):
        unknown = set(values) - set(names)
        if unknown:
            raise BadValue(f"{split} has labels that are no class: {sorted(unknown)[:_MAX_SHOWN]}")
        return
    labels = np.asarray(values)
    bad = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(bad):
        raise BadValue(
            f"label {labels[bad[0]]} at row {bad[0]} of {split} is outside 0..{len(names) - 1}; so are "
            f"{len(bad) - 1} more"
        )


def count_rows(split: Split) -> int:
    """Count the rows of a split; a stream of unknown size is read once, without its images."""
    return split.size if split.size is not None else sum(1 for _ in split.rows.select_columns(["label"]))
