"""Both splits of a detection data set, whatever its format."""

from pathlib import Path
from typing import NamedTuple

from dg_timm._errors import BadValue
from dg_timm._files import real_paths
from dg_timm.detection.data.boxes import Categories, DetectionSplit, DetectionSplits
from dg_timm.detection.data.coco import annotation_file, annotation_files, found_files_hint, read_coco
from dg_timm.detection.data.columns import ColumnTable, open_tables, table_categories
from dg_timm.training.data.folders import IMAGE_SUFFIXES
from dg_timm.training.data.splits import HELD_OUT_SPLITS, TRAIN_SPLITS, pick_split


class DataOptions(NamedTuple):
    """How a detection data set is read.

    Attributes:
        val_source: another data set to evaluate on; by default a split of the first one.
        train_split: name of the split to train on; by default train.
        val_split: name of the split to evaluate on; by default validation, or else test.
        train_annotations: COCO file to train on, if its name is not ``instances_SPLIT.json``.
        val_annotations: COCO file to evaluate on, likewise.
        image_folder: folder of a COCO data set's images; by default the usual places are searched.
        box_format: how boxes in a column of objects are written: ``coco`` [left, top, width, height] or ``voc``
            [left, top, right, bottom], both in pixels, or ``yolo`` [center x, center y, width, height] as fractions
            of the image.
        drop_bad_boxes: leave out boxes of zero size and boxes outside their image, instead of refusing them.
        skip_empty: leave images without boxes out of training.
    """

    val_source: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    train_annotations: str | None = None
    val_annotations: str | None = None
    image_folder: str | None = None
    box_format: str = "coco"
    drop_bad_boxes: bool = False
    skip_empty: bool = False


def load_detection(
    source: str,
    options: DataOptions = DataOptions(),  # noqa: B008 (immutable)
    *,
    known: Categories | None = None,
) -> DetectionSplits:
    """Load a detection data set; no image is decoded.

    Args:
        source: ``digits``: pages of scikit-learn's handwritten digits. A folder with images and COCO annotation files
            (``instances_train.json``, ``annotations/instances_train2017.json``, ``train/_annotations.coco.json``). Or
            what :mod:`dg_timm.training.data.opening` opens (the Hub, Parquet, ``save_to_disk``), with a column of
            images and one of ``objects`` (``bbox`` and ``category``).
        options: which splits and files to read, and how.
        known: the classes of a detector that is to be evaluated; nothing is then loaded to train on.

    Raises:
        BadValue: a folder, an annotation file or an image does not exist; something is empty, malformed or unknown;
            or a box is bad.
    """
    places = [Path(place).expanduser() for place in (source, options.val_source or source)]
    named = options.train_annotations or options.val_annotations
    if named or any(annotation_files(place) for place in places):
        splits, test_categories = _load_coco(places[0], places[1], options, known)
    else:
        splits, test_categories = _load_tables(source, options, known)
    if test_categories != splits.categories:
        raise BadValue(f"the categories to evaluate on, {test_categories.by_id}, are not {splits.categories.by_id}")
    splits = splits._replace(left_out=(*_describe_dropped(splits), *_describe_unnamed(splits)))
    splits = _without_held_out(splits)
    if options.skip_empty:
        kept = [row for row in splits.train.rows if not row.crowd.all()]
        splits = splits._replace(train=splits.train._replace(rows=kept))
    return splits


def _without_held_out(splits: DetectionSplits) -> DetectionSplits:
    """Take the images that are evaluated on out of those to learn from."""
    if splits.train.table is not None or splits.test.table is not None:
        return splits
    held_out = set(real_paths(row.source for row in splits.test.rows))
    places = real_paths(row.source for row in splits.train.rows)
    kept = [row for row, place in zip(splits.train.rows, places, strict=True) if place not in held_out]
    shared = len(splits.train.rows) - len(kept)
    if not shared:
        return splits
    if not kept:
        raise BadValue(f"{splits.train.name} and {splits.test.name} name the same images; evaluate on others")
    said = f"{shared} images of {splits.train.name} from training, because they are evaluated on"
    return splits._replace(train=splits.train._replace(rows=kept), left_out=(*splits.left_out, said))


def _describe_dropped(splits: DetectionSplits) -> list[str]:
    return [f"{part.dropped} bad boxes of {part.name}" for part in (splits.train, splits.test) if part.dropped]


def _describe_unnamed(splits: DetectionSplits) -> list[str]:
    """Count the images of COCO's folders that no annotation file which was read names."""
    parts = [part for part in (splits.train, splits.test) if part.folder is not None]
    named = set(real_paths(row.source for part in parts for row in part.rows))
    found = []
    for folder in dict.fromkeys(part.folder.resolve() for part in parts if part.folder is not None):
        images = (str(path) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        unnamed = sum(path not in named for path in real_paths(images))
        if unnamed:
            found.append(f"{unnamed} images in {folder} that are in no annotation file that was read")
    return found


def _load_coco(
    folder: Path, val_folder: Path, options: DataOptions, known: Categories | None
) -> tuple[DetectionSplits, Categories]:
    """Both splits, and the categories of the one to evaluate on."""
    train, learned = _no_rows(str(folder)), None
    if known is None:
        learned = annotation_file(folder, options.train_split, TRAIN_SPLITS, options.train_annotations)
        if learned is None:
            raise BadValue(
                f"{folder} has no annotation file for {options.train_split or 'train'}{found_files_hint(folder)}; name "
                "it with --train-annotations, or its split with --train-split"
            )
        train, known = read_coco(learned, folder, options.image_folder, options.drop_bad_boxes)
    file = annotation_file(val_folder, options.val_split, HELD_OUT_SPLITS, options.val_annotations)
    if file is None:
        raise BadValue(
            f"{val_folder} has no annotation file to evaluate on{found_files_hint(val_folder)}; name it with "
            "--val-annotations, or its split with --val-split"
        )
    if learned is not None and file.resolve() == learned.resolve():
        raise BadValue(f"{file} holds the images to train on; name others to evaluate on with --val-annotations")
    test, test_categories = read_coco(file, val_folder, options.image_folder, options.drop_bad_boxes, known)
    return DetectionSplits(train, test, known), test_categories


def _load_tables(source: str, options: DataOptions, known: Categories | None) -> tuple[DetectionSplits, Categories]:
    """Both splits, and the categories of the one to evaluate on."""
    val_source = options.val_source or source
    parts = open_tables(source)
    val_parts = open_tables(val_source) if options.val_source else parts
    rows = pick_split(val_parts, options.val_split, HELD_OUT_SPLITS, val_source, "--val-split")
    if rows is None:
        raise BadValue(f"{val_source} has the splits {', '.join(val_parts)}; choose one with --val-split")
    val_table = ColumnTable(rows, f"the evaluation split of {val_source}")
    train = _no_rows(source)
    if known is None:
        rows = pick_split(parts, options.train_split, TRAIN_SPLITS, source, "--train-split")
        if rows is None:
            raise BadValue(f"{source} has the splits {', '.join(parts)}; choose one with --train-split")
        if rows is val_table.table:
            raise BadValue(f"{val_source}: the rows to train on and to evaluate on are the same; choose others with "
                           "--val-split or --val-data")  # fmt: skip
        train_table = ColumnTable(rows, f"the training split of {source}")
        known, test_categories = table_categories(train_table, val_table)
        train = train_table.read(known, options.box_format, options.drop_bad_boxes)
    else:
        names = val_table.class_names
        own = None if names is None else Categories(names, list(range(len(names))))
        test_categories = known if own is None or known.labels_of(own.by_id) is not None else own
    test = val_table.read(test_categories, options.box_format, options.drop_bad_boxes)
    return DetectionSplits(train, test, known), test_categories


def _no_rows(source: str) -> DetectionSplit:
    return DetectionSplit([], f"nothing of {source}")
