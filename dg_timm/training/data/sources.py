"""Load labeled images: data sets of the Hugging Face Hub, local ones in its formats, and the digits of scikit-learn.

Rows come out undecoded (``{"bytes", "path"}``): the loader's workers decode them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Image, IterableDataset, Value

from dg_timm._errors import BadValue
from dg_timm.training.data.labels import find_labeled, name_classes, names_of_numbers, set_aside
from dg_timm.training.data.opening import open_source
from dg_timm.training.data.splits import HELD_OUT_SPLITS, TRAIN_SPLITS, Split, Splits, find_split


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
    skip_bad_rows: bool = False,
    only_evaluate: bool = False,
) -> Splits:
    """Load a data set for classification. No row is in both splits.

    Args:
        source: ``digits`` (scikit-learn's 1,797 handwritten digits, 8 x 8); a folder (of images, with a folder for
            each class, optionally below train/ and val/, validation/ or test/; of Parquet files; of webdataset shards;
            or saved by ``save_to_disk``); a Parquet or tar file; a CSV file of file names and labels; or the name of a
            data set on the Hub.
        val_source: another data set to evaluate on; by default a split of ``source``.
        train_split, val_split: names of the splits; by default train, and validation or else test. A data set with a
            single split is split.
        image_key, label_key: names of the columns; by default the image column, and the ClassLabel column.
        label_names: one name for each class, where the data set has none.
        num_classes: number of classes, where labels are integers and a stream does not tell how many there are.
        streaming: read rows as they are needed instead of copying the data set to the disk first.
        test_fraction: share of every class that is set aside where there is no split to evaluate on.
        seed: of that choice.
        cache_dir: folder for the copy that ``datasets`` makes; by default its own cache.
        skip_bad_rows: leave out and count rows whose label is no class, instead of refusing them.
        only_evaluate: nothing is trained: of a data set whose splits are held out ones, take all rows of the first.

    Raises:
        BadValue: for a path that does not exist, and for a split, column or label names that are missing, empty, or
            out of range.
    """
    finder = _Finder(streaming, cache_dir, image_key, only_evaluate)
    found = finder.find(source, val_source, train_split, val_split)
    reader = _Reader(skip_bad_rows, list(found.left_out))
    val_source = val_source or source
    first, first_source = (found.train, source) if found.train is not None else (found.test, val_source)
    image, label = _columns(first, image_key, label_key, first_source)
    names = name_classes(first, label, label_names, num_classes, first_source)
    own = names if isinstance(first.features[label], ClassLabel) else None
    if found.train is None:
        test = reader.read(first, image, label, f"the evaluation split of {val_source}", names, own)
        return Splits(Split(None, f"nothing of {source}", 0), test, names, tuple(reader.left_out))
    train = reader.read(first, image, label, f"the training split of {source}", names, own)
    if found.test is None:
        return Splits(*_divide(train, test_fraction, seed, source), names, tuple(reader.left_out))
    val_image, val_label = _columns(found.test, image_key, label_key, val_source, (image, label))
    val_own = names_of_numbers(first.features[label], found.test.features[val_label], names)
    test = reader.read(found.test, val_image, val_label, f"the evaluation split of {val_source}", names, val_own)
    return Splits(train, test, names, tuple(reader.left_out))


def _divide(split: Split, fraction: float, seed: int, source: str) -> tuple[Split, Split]:
    """Set a part of every class aside; return the rest, and that part."""
    kept, aside = set_aside(split.rows.select_columns(["label"])[:]["label"], fraction, seed, source)
    return split.select(kept), split.select(aside, f"{100 * fraction:.0f} % of {source}, set aside")


class _Found(NamedTuple):
    """The rows to train on and to evaluate on (None where there are none), and what was left out."""

    train: Any
    test: Any
    left_out: list[str]


class _Finder:
    """Finds the rows of both splits."""

    def __init__(self, streaming: bool, cache_dir: Path | None, image_key: str | None, only_evaluate: bool) -> None:
        self.streaming, self.cache_dir, self.image_key = streaming, cache_dir, image_key
        self.only_evaluate = only_evaluate

    def find(self, source: str, val_source: str | None, train_split: str | None, val_split: str | None) -> _Found:
        asked = [name for name in (train_split, None if val_source else val_split) if name is not None]
        parts, left_out = open_source(source, self.streaming, self.cache_dir, asked, self.image_key)
        test = None if val_source else find_split(parts, val_split, HELD_OUT_SPLITS, source, "--val-split")
        train = find_split(parts, train_split, TRAIN_SPLITS, source, "--train-split")
        if train is None and not (self.only_evaluate and test is not None):
            train = self._only_split(parts, source, val_split if val_source is None else None)
        if test == train and val_split and val_source is None:
            raise BadValue(f"--val-split {val_split} of {source} holds the rows to train on; choose others to evaluate "
                           "on, or give --val-data")  # fmt: skip
        test = None if test == train else test
        used = {name: parts[name] for name in (train, test) if name is not None}
        left_out += [f"the split {name} ({_size(part)})" for name, part in parts.items() if name not in used]
        test_rows = used.get(test or "")
        if val_source is not None:
            test_rows, more = self._other(source, train, val_source, val_split)
            left_out += more
        if self.streaming and test_rows is None:
            raise BadValue(
                f"{source} has no {' or '.join(HELD_OUT_SPLITS)} split; name one with --val-split or --val-data"
            )
        return _Found(used.get(train or ""), test_rows, left_out)

    def _only_split(self, parts: dict[str, Any], source: str, val_split: str | None) -> str:
        """Return the split to train on where none is named train: the only one that is not asked for otherwise."""
        others = [name for name in parts if name != val_split]
        if len(others) != 1:
            have = ", ".join(parts) or "no images"
            raise BadValue(f"{source} has no split named train, only {have}; choose with --train-split")
        return others[0]

    def _other(self, source: str, train: str | None, val_source: str, val_split: str | None) -> tuple[Any, list[str]]:
        """Find the rows to evaluate on in a source of their own."""
        asked = [val_split] if val_split else []
        parts, left_out = open_source(val_source, self.streaming, self.cache_dir, asked, self.image_key)
        test = find_split(parts, val_split, HELD_OUT_SPLITS, val_source, "--val-split")
        if test is None and len(parts) != 1:
            raise BadValue(f"{val_source} has the splits {', '.join(parts) or 'no images'}; choose with --val-split")
        test = test or next(iter(parts))
        same = Path(source).expanduser().resolve() == Path(val_source).expanduser().resolve()
        if same and test == train and not self.only_evaluate:
            raise BadValue(f"--val-data {val_source} holds the rows to train on; give others, or leave it out and a "
                           "part is set aside")  # fmt: skip
        others = [f"the split {name} ({_size(part)})" for name, part in parts.items() if name not in (test, train)]
        return parts[test], [f"of {val_source}: {one}" for one in ([*left_out, *others] if not same else [])]


def _size(part: Any) -> str:
    return "a stream" if isinstance(part, IterableDataset) else f"{len(part)} rows"


def _columns(
    rows: Any, image_key: str | None, label_key: str | None, source: str, usual: tuple[str, ...] = ()
) -> tuple[str, str]:
    """Find the columns of images and of labels; ``usual`` are their names in another split of the data."""
    features = dict(rows.features or {})
    if usual:
        image_key, label_key = (key or (name if name in features else None)
                                for key, name in zip((image_key, label_key), usual, strict=True))  # fmt: skip
    have = ", ".join(f"{name} ({feature})" for name, feature in features.items()) or "none"
    if image_key is not None and image_key not in features and isinstance(features.get("image"), Image):
        image_key = "image"  # the column of a table of files, which holds the images now
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
    is_label = isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "str", "large_str"))
    if not isinstance(kind, ClassLabel) and not is_label:
        raise BadValue(f"column {label} of {source} is {kind}; labels must be integers or text")
    return image, label


def _prefer(names: list[str], preferred: str) -> str | None:
    return preferred if preferred in names else next(iter(names), None)


class _Reader:
    """Makes splits of two columns, and checks labels where that needs no reading of a stream.

    Args:
        skip: leave out rows whose label is no class, and count them in ``left_out``.
        left_out: remarks so far.
    """

    def __init__(self, skip: bool, left_out: list[str]) -> None:
        self.skip, self.left_out = skip, left_out

    def read(
        self, rows: Any, image: str, label: str, name: str, names: Sequence[str], classes: Sequence[str] | None
    ) -> Split:
        """Make a split.

        Args:
            rows: of ``datasets``.
            image, label: names of the columns.
            name: how messages call the split.
            names: of the classes.
            classes: what the numbers in the labels stand for; None where they are numbers of ``names``.
        """
        if isinstance(rows, IterableDataset):
            # First of all: what follows would decode every image here, and encode it again with a loss.
            rows = rows.cast_column(image, Image(decode=False))
            rows = rows.reshard()  # Parquet: a shard for each row group instead of one for each file
        rows = rows.select_columns([image, label])
        rows = rows.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
        if isinstance(rows, IterableDataset):
            known = (rows.info.splits or {}).get(str(rows.split)) if rows.split else None
            return Split(rows, name, known.num_examples if known and known.num_examples else None, classes=classes)
        if len(rows) == 0:
            raise BadValue(f"{name} is empty")
        good = find_labeled(rows.select_columns(["label"])[:]["label"], classes or names, name, self.skip)
        split = Split(rows.cast_column("image", Image(decode=False)), name, len(rows), classes=classes)
        if good is None:
            return split
        self.left_out.append(f"{len(rows) - len(good)} rows of {name} whose label is no class")
        return split.select(good)
