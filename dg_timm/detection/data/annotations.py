"""Both splits of a detection data set, whatever its format."""

from pathlib import Path
from typing import Optional

from dg_timm.detection.data.boxes import Categories, DetectionSplit, DetectionSplits
from dg_timm.detection.data.coco import annotation_file, annotation_files, beside, read_coco
from dg_timm.detection.data.columns import Table, open_tables, table_categories
from dg_timm.training.data.sources import HELD_OUT_SPLITS, TRAIN_SPLITS, pick_split


def load_detection(
    source: str,
    *,
    val_source: Optional[str] = None,
    train_split: Optional[str] = None,
    val_split: Optional[str] = None,
    train_annotations: Optional[str] = None,
    val_annotations: Optional[str] = None,
    image_folder: Optional[str] = None,
    box_format: str = "coco",
    drop_bad_boxes: bool = False,
    skip_empty: bool = False,
    known: Optional[Categories] = None,
) -> DetectionSplits:
    """Load a detection data set.

    Args:
        source: ``digits``, pages of scikit-learn's handwritten digits; a folder with images and COCO annotation files
            (``instances_train.json``, ``annotations/instances_train2017.json``, ``train/_annotations.coco.json``); or
            what :mod:`dg_timm.training.data.sources` opens (the Hub, Parquet, ``save_to_disk``), with a column of images and
            one of ``objects`` (``bbox`` and ``category``).
        val_source: another one to evaluate on.
        train_split, val_split: by default train, and validation or else test.
        train_annotations, val_annotations: COCO files, where their names are others.
        image_folder: of a COCO data set; by default it is looked for.
        box_format: of data sets with ``objects``: ``coco`` [left, top, width, height], ``voc`` [left, top, right,
            bottom], both in pixels, or ``yolo`` [centre x, centre y, width, height] as parts of the image.
        drop_bad_boxes: leave out boxes of zero size and those outside their image, instead of refusing them.
        skip_empty: leave out images without boxes from training.
        known: the categories of a detector that is to be evaluated; nothing is then loaded to train on.

    Raises:
        FileNotFoundError: naming a folder, an annotation file or an image that is not there.
        ValueError: naming what is empty, malformed, unknown, or a box that can't be one.
    """
    folder = Path(source).expanduser()
    other = Path(val_source).expanduser() if val_source else folder
    train = DetectionSplit([], f"nothing of {source}")
    if any(annotation_files(place) for place in (folder, other)) or train_annotations or val_annotations:
        if known is None:
            train_file = annotation_file(folder, train_split, TRAIN_SPLITS, train_annotations)
            if train_file is None:
                what = train_split or "train"
                raise FileNotFoundError(
                    f"{folder} has no annotation file for {what}{beside(folder)}; name it with --train-annotations, "
                    "or its split with --train-split"
                )
            train, known = read_coco(train_file, folder, image_folder, drop_bad_boxes)
        val_file = annotation_file(other, val_split, HELD_OUT_SPLITS, val_annotations)
        if val_file is None:
            raise FileNotFoundError(
                f"{other} has no annotation file to evaluate on{beside(other)}; name it with --val-annotations, or "
                "its split with --val-split"
            )
        test, theirs = read_coco(val_file, other, image_folder, drop_bad_boxes)
    else:
        parts = open_tables(source)
        others = open_tables(val_source) if val_source else parts
        val_rows = pick_split(others, val_split, HELD_OUT_SPLITS, val_source or source, "--val-split")
        if val_rows is None:
            raise ValueError(f"{val_source or source} has the splits {', '.join(others)}; choose one with --val-split")
        val_table = Table(val_rows, f"the evaluation split of {val_source or source}")
        if known is None:
            train_rows = pick_split(parts, train_split, TRAIN_SPLITS, source, "--train-split")
            if train_rows is None:
                raise ValueError(f"{source} has the splits {', '.join(parts)}; choose one with --train-split")
            train_table = Table(train_rows, f"the training split of {source}")
            known, theirs = table_categories(train_table, val_table)
            train = train_table.read(known, box_format, drop_bad_boxes)
        else:
            names = val_table.class_names
            theirs = known if names is None else Categories(names, list(range(len(names))))
        test = val_table.read(theirs, box_format, drop_bad_boxes)
    if theirs != known:
        raise ValueError(f"the categories to evaluate on, {theirs.by_id}, are not {known.by_id}")
    if skip_empty:
        train = train._replace(rows=[row for row in train.rows if not row.crowd.all()])
    return DetectionSplits(train, test, known)
