"""Load labeled images: data sets of the Hugging Face Hub, local ones in its formats, and the digits of scikit-learn.

Rows come out undecoded (``{"bytes", "path"}``): the loader's workers decode them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Image, IterableDataset

from dg_timm._errors import BadValue
from dg_timm._files import real_paths
from dg_timm.hub.labeling import SINGLE, Labeling
from dg_timm.training.data.columns import Asked, Columns, find_columns
from dg_timm.training.data.labels import find_labeled, name_classes, set_aside
from dg_timm.training.data.opening import open_source
from dg_timm.training.data.several import check_several, name_several, names_to_evaluate, set_aside_rows
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
    labeling: Labeling = SINGLE,
    label_separator: str | None = None,
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
        image_key, label_key, label_separator, labeling: see :class:`dg_timm.training.data.columns.Asked`.
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
    reader = _Reader(Asked(image_key, label_key, label_separator, labeling), skip_bad_rows, list(found.left_out))
    val_source = val_source or source
    if found.train is None:
        test, names = reader.read(found.test, val_source, "evaluation", label_names, num_classes)
        return Splits(Split(None, f"nothing of {source}", 0), test, names, tuple(reader.left_out))
    train, names = reader.read(found.train, source, "training", label_names, num_classes)
    if found.test is None:
        train, test = _divide(train, test_fraction, seed, source)
        return Splits(_without_held_out(train, test, reader.left_out), test, names, tuple(reader.left_out))
    test = reader.read_other(found.test, val_source, names)
    if not only_evaluate:
        train = _without_held_out(train, test, reader.left_out)
    return Splits(train, test, names, tuple(reader.left_out))


def _without_held_out(train: Split, test: Split, left_out: list[str]) -> Split:
    """Take the image files that are evaluated on out of those to train on; rows that hold their images are left."""
    learned, held_out = _files_of(train), _files_of(test)
    if learned is None or held_out is None:
        return train
    evaluated = set(held_out) - {""}
    kept = [row for row, file in enumerate(learned) if file not in evaluated]
    if not kept:
        raise BadValue(f"{train.name} and {test.name} hold the same images; give others to evaluate on (--val-data)")
    if len(kept) == len(learned):
        return train
    left_out.append(f"{len(learned) - len(kept)} images of {train.name}, because they are evaluated on")
    return train.select(kept)


def _files_of(split: Split) -> list[str] | None:
    """The image files of a split, as the file system has them, and "" for none; None where rows hold their images."""
    first = None if split.streamed or not split.size else split.rows[0]["image"]
    if first is None or first["bytes"] is not None:
        return None
    images = split.rows.select_columns(["image"])[:]["image"]
    named = [image["path"] if image and image["path"] else "" for image in images]
    return [path and real for path, real in zip(named, real_paths(named), strict=True)]


def _divide(split: Split, fraction: float, seed: int, source: str) -> tuple[Split, Split]:
    """Set a part of every class aside, or of all rows where they have several; return the rest, and that part."""
    if split.form.labeling.task == "single":
        kept, aside = set_aside(split.rows.select_columns(["label"])[:]["label"], fraction, seed, source)
    else:
        kept, aside = set_aside_rows(len(split.rows), fraction, seed, source)
    return split.select(kept), split.select(aside, f"{100 * len(aside) / len(split.rows):.0f} % of {source}, set aside")


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


class _Reader:
    """Makes splits of two columns, and checks labels where that needs no reading of a stream.

    Args:
        asked: what the user says of the columns.
        skip: leave out rows whose label is no class, and count them in ``left_out``.
        left_out: remarks so far.
    """

    def __init__(self, asked: Asked, skip: bool, left_out: list[str]) -> None:
        self.asked, self.skip, self.left_out = asked, skip, left_out
        self.columns: Columns | None = None  # of the first split, ...
        self.own: Sequence[str] | None = None  # ... and what the numbers in its labels stand for

    def read(
        self, rows: Any, source: str, purpose: str, label_names: Sequence[str] | None, num_classes: int | None
    ) -> tuple[Split, list[str]]:
        """Make the split that names the classes, and give their names.

        Args:
            rows: of ``datasets``.
            source: of the rows; with ``purpose``, how messages call the split.
            label_names, num_classes: what the user says of the classes.
        """
        self.columns = columns = find_columns(rows, self.asked, source)
        if columns.form.kind == "class":
            names = name_classes(rows, columns.labels[0], label_names, num_classes, source)
        else:
            names = name_several(rows, columns, label_names, self.asked, source)
        named = label_names is not None or len(columns.labels) > 1
        self.own = names if columns.known is not None or (columns.form.kind == "vector" and named) else None
        return self._read(rows, columns, f"the {purpose} split of {source}", names, self.own), names

    def read_other(self, rows: Any, source: str, names: Sequence[str]) -> Split:
        """Make the split to evaluate on, whose classes are those of the first."""
        assert self.columns is not None
        columns = find_columns(rows, self.asked, source, self.columns)
        own = names_to_evaluate(columns, self.columns, names, self.own, source)
        return self._read(rows, columns, f"the evaluation split of {source}", names, own)

    def _read(
        self, rows: Any, columns: Columns, name: str, names: Sequence[str], classes: Sequence[str] | None
    ) -> Split:
        if not isinstance(rows, IterableDataset) and len(rows) == 0:
            raise BadValue(f"{name} is empty")
        # First of all: what follows would decode every image here, and encode it again with a loss.
        rows = rows.cast_column(columns.image, Image(decode=False))
        if isinstance(rows, IterableDataset):
            known = (rows.info.splits or {}).get(str(rows.split)) if rows.split else None
            rows = rows.reshard()  # Parquet: a shard for each row group instead of one for each file
            size = known.num_examples if known and known.num_examples else None
            return Split(columns.take(rows), name, size, classes=classes, form=columns.form)
        rows = columns.take(rows)
        split = Split(rows, name, len(rows), classes=classes, form=columns.form)
        if columns.form.kind == "class":
            good = find_labeled(rows.select_columns(["label"])[:]["label"], classes or names, name, self.skip)
        else:
            good = check_several(split, names, self.skip).good
        if good is None:
            return split
        self.left_out.append(f"{len(rows) - len(good)} rows of {name} whose label is no class")
        return split.select(good)
