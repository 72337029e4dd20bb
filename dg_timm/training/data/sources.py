"""Labelled images: data sets of the Hugging Face Hub, local ones in its formats, and the embedded digits.

Rows come out undecoded (``{"bytes", "path"}``): decoding is left to the loader's workers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

TRAIN_SPLITS = ("train", "training")
HELD_OUT_SPLITS = ("validation", "val", "valid", "test")  # a Hub test split often has no labels


class Split(NamedTuple):
    """One split.

    Attributes:
        rows: a ``datasets.Dataset``, or an ``IterableDataset`` if streamed, with the columns ``image`` (undecoded) and
            ``label`` (int, or str if ``label_names`` must be applied).
        name: for messages, e.g. ``split train of digits``.
        size: rows, None where only reading it all would tell.
        places: (size,) the rows' numbers in the data set, where some were left out.
    """

    rows: Any
    name: str
    size: Optional[int]
    places: Optional[Any] = None

    @property
    def streamed(self) -> bool:
        return isinstance(self.rows, IterableDataset)

    def place(self, row: int) -> int:
        """The number in the data set of a row of this split."""
        return row if self.places is None else int(self.places[row])

    def choose(self, rows: Sequence[int], name: Optional[str] = None) -> "Split":
        """Only these rows."""
        places = np.asarray([self.place(row) for row in rows])
        return Split(self.rows.select(rows), name or self.name, len(rows), places)


class Splits(NamedTuple):
    train: Split
    test: Split
    label_names: list[str]


def load_splits(
    source: str,
    *,
    val_source: Optional[str] = None,
    train_split: Optional[str] = None,
    val_split: Optional[str] = None,
    image_key: Optional[str] = None,
    label_key: Optional[str] = None,
    label_names: Optional[Sequence[str]] = None,
    num_classes: Optional[int] = None,
    streaming: bool = False,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Splits:
    """Load a classification data set.

    Args:
        source: ``digits`` (scikit-learn's 1,797 handwritten digits, 8 x 8); a folder (of images, a folder for each
            class, optionally below train/ and validation/ or test/; of Parquet files; of webdataset shards; saved by
            ``save_to_disk``); a Parquet or tar file; or the name of a data set on the Hub.
        val_source: another one to evaluate on; by default a split of ``source``.
        train_split, val_split: their names; by default train, and validation or else test.
        image_key, label_key: names of the columns; by default the image column, and the ClassLabel column.
        label_names: one for each class, where the data set does not tell.
        num_classes: the same, for integer labels that stand for themselves.
        streaming: read rows as they are needed instead of copying the data set to the disk first.
        test_fraction: share of every class that is set aside where there is no split to evaluate on.
        seed: of that choice.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: naming what is missing (a split, a column, label names), empty, or out of range.
    """
    parts = load_parts(source, streaming)
    train_rows = pick_split(parts, train_split, TRAIN_SPLITS, source, "--train-split")
    if train_rows is None:
        if len(parts) > 1:
            raise ValueError(f"{source} has no split named train, only {', '.join(parts)}; choose with --train-split")
        train_rows = next(iter(parts.values()))
    if val_source is not None:
        others = load_parts(val_source, streaming)
        val_rows = pick_split(others, val_split, HELD_OUT_SPLITS, val_source, "--val-split") or next(
            iter(others.values())
        )
    else:
        val_rows = pick_split(parts, val_split, HELD_OUT_SPLITS, source, "--val-split")

    image, label = _columns(train_rows, image_key, label_key, source)
    names = _label_names(train_rows, label, label_names, num_classes, source)
    train_name, val_name = f"the training split of {source}", f"the evaluation split of {val_source or source}"
    if val_rows is None:
        if streaming:
            raise ValueError(
                f"{source} has no {' or '.join(HELD_OUT_SPLITS)} split; name one with --val-split or --val-data"
            )
        kept, aside = _set_aside(train_rows, label, test_fraction, seed, source)
        whole = _split(train_rows, image, label, names, train_name)
        return Splits(
            whole.choose(kept), whole.choose(aside, f"{100 * test_fraction:.0f} % of {source}, set aside"), names
        )
    val_image, val_label = _columns(val_rows, image_key or image, label_key or label, val_source or source)
    own = val_rows.features[val_label]
    theirs = train_rows.features[label]
    if isinstance(own, ClassLabel) and isinstance(theirs, ClassLabel) and own.names != theirs.names:
        raise ValueError(f"the classes to evaluate on, {own.names[:8]}, are not those to train on, {theirs.names[:8]}")
    return Splits(
        _split(train_rows, image, label, names, train_name),
        _split(val_rows, val_image, val_label, names, val_name),
        names,
    )


def load_parts(source: str, streaming: bool) -> dict[str, Any]:
    """The splits of a source of :func:`load_splits`, as ``datasets`` gives them."""
    try:
        return _open(source, streaming)
    except ValueError as error:  # of datasets, which does not name the source
        raise error if source in str(error) else ValueError(f"{source} can't be read: {error}") from error


def _open(source: str, streaming: bool) -> dict[str, Any]:
    if source == "digits":
        return {"train": _digits()}
    path = Path(source).expanduser()
    if path.is_file():
        kind = {".parquet": "parquet", ".tar": "webdataset"}.get(path.suffix)
        if kind is None:
            raise ValueError(f"{source} is neither a folder nor a .parquet or .tar file")
        return dict(datasets.load_dataset(kind, data_files={"train": str(path)}, streaming=streaming))
    if not path.is_dir():
        if source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{source} is not there; give a folder with a folder of images for each class")
        return dict(datasets.load_dataset(source, streaming=streaming))
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        saved = datasets.load_from_disk(str(path))  # memory-mapped: nothing is copied
        parts = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        if streaming:
            parts = {
                name: part.to_iterable_dataset(num_shards=min(64, max(len(part), 1))) for name, part in parts.items()
            }
        return parts
    return dict(datasets.load_dataset(str(path), streaming=streaming))


def pick_split(parts: dict[str, Any], asked: Optional[str], usual: Sequence[str], source: str, option: str) -> Any:
    """The split that was asked for, or the first usual one; None if there is no such split."""
    if asked is not None and asked not in parts:
        raise ValueError(f"{option} {asked}: {source} has no such split; it has {', '.join(parts)}")
    return parts.get(asked) if asked else next((parts[name] for name in usual if name in parts), None)


def _columns(rows: Any, image_key: Optional[str], label_key: Optional[str], source: str) -> tuple[str, str]:
    features = dict(rows.features or {})
    have = ", ".join(f"{name} ({feature})" for name, feature in features.items()) or "none"
    for key, option in ((image_key, "--image-key"), (label_key, "--label-key")):
        if key is not None and key not in features:
            raise ValueError(f"{option} {key}: {source} has no such column; its columns are {have}")
    image = image_key or _only([k for k, f in features.items() if isinstance(f, Image)], "image")
    if image is None or not isinstance(features[image], Image):
        raise ValueError(f"{source} has no image column{' ' + image if image else ''}; its columns are {have}")
    label = label_key or _only([k for k, f in features.items() if isinstance(f, ClassLabel)], "label")
    label = label or next((k for k in ("label", "cls") if k in features), None)  # cls: webdataset's usual name
    if label is None:
        raise ValueError(f"{source} has no label column; name one with --label-key. Its columns are {have}")
    kind = features[label]
    if not isinstance(kind, ClassLabel) and not (
        isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "str"))
    ):
        raise ValueError(f"column {label} of {source} is {kind}; labels must be integers or text")
    return image, label


def _only(names: list[str], preferred: str) -> Optional[str]:
    return preferred if preferred in names else next(iter(names), None)


def _label_names(
    rows: Any, label: str, given: Optional[Sequence[str]], num_classes: Optional[int], source: str
) -> list[str]:
    feature = rows.features[label]
    if isinstance(feature, ClassLabel):
        if given is not None and len(given) != len(feature.names):
            raise ValueError(f"{len(given)} label names for the {len(feature.names)} classes of {source}")
        return list(given or feature.names)
    if given is not None:
        return list(given)
    if isinstance(rows, IterableDataset) and num_classes is not None:
        return [str(k) for k in range(num_classes)]
    if isinstance(rows, IterableDataset):
        raise ValueError(
            f"column {label} of {source} is {feature}, which does not tell the classes of a stream; give --label-names "
            "(a file with a name a line) or --num-classes"
        )
    values = rows.unique(label)
    values = [value for value in values if value is not None]
    if values and isinstance(values[0], str):
        return sorted(values)
    return [str(k) for k in range(max(values, default=-1) + 1)]


def _set_aside(rows: Any, label: str, fraction: float, seed: int, source: str) -> tuple[list[int], list[int]]:
    labels = rows.select_columns([label])[:][label]
    if labels and min(np.unique(labels, return_counts=True)[1]) < 2:
        raise ValueError(
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
        raise ValueError(f"{name} is empty")
    values = rows.select_columns(["label"])[:]["label"]
    if None in values:
        raise ValueError(f"row {values.index(None)} of {name} has no label")
    if isinstance(values[0], str):
        unknown = set(values) - set(names)
        if unknown:
            raise ValueError(f"{name} has labels that are no class: {sorted(unknown)[:8]}")
    else:
        labels = np.asarray(values)
        bad = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if len(bad):
            raise ValueError(
                f"label {labels[bad[0]]} at row {bad[0]} of {name} is outside 0..{len(names) - 1}; so are "
                f"{len(bad) - 1} more"
            )
    return Split(rows.cast_column("image", Image(decode=False)), name, len(rows))


def count_rows(split: Split) -> int:
    """Rows of a split; of a stream of unknown size by reading its labels once."""
    return split.size if split.size is not None else sum(1 for _ in split.rows.select_columns(["label"]))


def _digits() -> Dataset:
    from PIL import Image as Pillow
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0..16
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    rows = {"image": [Pillow.fromarray(image) for image in grey], "label": digits.target.tolist()}
    return Dataset.from_dict(rows, features=features)
