"""Boxes of images: COCO annotation files, and detection data sets of the Hub. Every box is checked once, here."""

import difflib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import datasets
import numpy as np
from datasets import ClassLabel
from PIL import Image as Pillow

from dg_timm.detection.digits import digit_pages
from dg_timm.training.sources import HELD_OUT_SPLITS, TRAIN_SPLITS, load_parts, pick_split

BOX_FORMATS = ("coco", "voc", "yolo")
SLACK = 1.0  # pixels by which rounding may take a box over the edge; it is clipped


class Categories(NamedTuple):
    """The classes: ``names[k]`` and the data set's own ``ids[k]`` are those of label k + 1; label 0 is background."""

    names: list[str]
    ids: list[int]

    @property
    def by_id(self) -> dict[int, str]:
        return dict(zip(self.ids, self.names, strict=True))


class Annotated(NamedTuple):
    """An image and its boxes.

    Attributes:
        image_id: the data set's own.
        place: path of the file, or the row in ``DetectionSplit.table``.
        size: (height, width) in pixels.
        boxes: (n, 4) float32, [left, top, right, bottom] in pixels; n may be 0.
        labels: (n,) int64, from 1 on.
        area: (n,) float32, square pixels, by which COCO tells small from large.
        crowd: (n,) bool: a group, which is not learned and whose detection is neither right nor wrong.
    """

    image_id: Any
    place: Any
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    crowd: np.ndarray


class DetectionSplit(NamedTuple):
    """One split: ``rows`` of :class:`Annotated`; ``table`` holds undecoded images where they are not files."""

    rows: list[Annotated]
    name: str
    table: Any = None
    dropped: int = 0  # bad boxes that were left out
    streamed: bool = False

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def boxes(self) -> int:
        return sum(len(row.boxes) for row in self.rows)

    def choose(self, rows: Sequence[int]) -> "DetectionSplit":
        return self._replace(rows=[self.rows[row] for row in rows])


class DetectionSplits(NamedTuple):
    train: DetectionSplit
    test: DetectionSplit
    categories: Categories


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
) -> DetectionSplits:
    """Load a detection data set.

    Args:
        source: ``digits``, pages of scikit-learn's handwritten digits; a folder with images and COCO annotation files
            (``instances_train.json``, ``annotations/instances_train2017.json``, ``train/_annotations.coco.json``); or
            what :mod:`dg_timm.training.sources` opens (the Hub, Parquet, ``save_to_disk``), with a column of images and
            one of ``objects`` (``bbox`` and ``category``).
        val_source: another one to evaluate on.
        train_split, val_split: by default train, and validation or else test.
        train_annotations, val_annotations: COCO files, where their names are others.
        image_folder: of a COCO data set; by default it is looked for.
        box_format: of data sets with ``objects``: ``coco`` [left, top, width, height], ``voc`` [left, top, right,
            bottom], both in pixels, or ``yolo`` [centre x, centre y, width, height] as parts of the image.
        drop_bad_boxes: leave out boxes of zero size and those outside their image, instead of refusing them.
        skip_empty: leave out images without boxes from training.

    Raises:
        FileNotFoundError: naming a folder, an annotation file or an image that is not there.
        ValueError: naming what is empty, malformed, unknown, or a box that can't be one.
    """
    folder = Path(source).expanduser()
    train_file = _annotation_file(folder, train_split, TRAIN_SPLITS, train_annotations)
    other = Path(val_source).expanduser() if val_source else folder
    val_file = _annotation_file(other, val_split, HELD_OUT_SPLITS, val_annotations)
    if train_file is not None:
        if val_file is None:
            raise FileNotFoundError(
                f"{other} has no annotation file to evaluate on{_beside(other)}; name it with --val-annotations, or "
                "its split with --val-split"
            )
        train, categories = _read_coco(train_file, folder, image_folder, drop_bad_boxes)
        test, theirs = _read_coco(val_file, other, image_folder, drop_bad_boxes)
    else:
        if train_annotations or val_annotations or any(folder.glob("*.json")):
            what = train_annotations or train_split or "train"
            raise FileNotFoundError(f"{folder} has no annotation file for {what}{_beside(folder)}")
        parts = digit_pages() if source == "digits" else load_parts(source, streaming=False)
        others = load_parts(val_source, streaming=False) if val_source else parts
        train_rows = pick_split(parts, train_split, TRAIN_SPLITS, source, "--train-split")
        val_rows = pick_split(others, val_split, HELD_OUT_SPLITS, val_source or source, "--val-split")
        for rows, option, have in ((train_rows, "--train-split", parts), (val_rows, "--val-split", others)):
            if rows is None:
                raise ValueError(f"{source} has the splits {', '.join(have)}; choose one with {option}")
        train, categories = _read_table(train_rows, f"the training split of {source}", box_format, drop_bad_boxes)
        name = f"the evaluation split of {val_source or source}"
        test, theirs = _read_table(val_rows, name, box_format, drop_bad_boxes)
    if theirs != categories:
        raise ValueError(
            f"the categories to evaluate on, {theirs.by_id}, are not those to train on, {categories.by_id}"
        )
    if skip_empty:
        train = train._replace(rows=[row for row in train.rows if not row.crowd.all()])
    if train.boxes == 0:
        raise ValueError(f"{train.name} has no box to learn from")
    if test.boxes == 0:
        raise ValueError(f"{test.name} has no box to evaluate on")
    return DetectionSplits(train, test, categories)


# ------------------------------------------------------------------------------------------ COCO


def _annotation_file(folder: Path, split: Optional[str], usual: Sequence[str], given: Optional[str]) -> Optional[Path]:
    if given is not None:
        file = Path(given).expanduser()
        file = file if file.is_file() else folder / given
        if not file.is_file():
            raise FileNotFoundError(f"there is no annotation file {given}, nor {folder / given}{_beside(folder)}")
        return file
    for name in [split] if split else usual:
        for pattern in (f"instances_{name}.json", f"instances_{name}20*.json", f"{name}.json",
                        f"{name}/_annotations.coco.json"):  # fmt: skip
            for place in (folder, folder / "annotations"):
                found = sorted(place.glob(pattern))
                if found:
                    return found[-1]
    return None


def _beside(folder: Path) -> str:
    found = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.json"))[:8] if folder.is_dir() else []
    return f" (there are {', '.join(found)})" if found else ""


def _read_coco(file: Path, folder: Path, image_folder: Optional[str], drop: bool) -> tuple[DetectionSplit, Categories]:
    content = _parse(file)
    categories = _coco_categories(content["categories"], file)
    label_of = {category: label for label, category in enumerate(categories.ids, start=1)}
    images: dict[Any, Any] = {}
    for image in content["images"]:
        for key in ("id", "file_name", "width", "height"):
            if key not in image:
                raise ValueError(f"an image of {file} has no {key}: {image}")
        if image["id"] in images:
            raise ValueError(f"{file} has two images with the id {image['id']}")
        images[image["id"]] = image
    of_image: dict[Any, list[Any]] = {key: [] for key in images}
    for annotation in content["annotations"]:
        if annotation.get("image_id") not in of_image:
            raise ValueError(
                f"annotation {annotation.get('id')} of {file} is of image {annotation.get('image_id')}, which is not "
                "among its images"
            )
        of_image[annotation["image_id"]].append(annotation)
    root = _image_root(file, folder, image_folder, [str(image["file_name"]) for image in images.values()])
    checks = _Checks(file.name, drop)
    rows = []
    for key, image in images.items():
        size = (int(image["height"]), int(image["width"]))
        boxes, areas, labels, crowds = [], [], [], []
        for annotation in of_image[key]:
            where = f"annotation {annotation.get('id')} of image {key} ({image['file_name']})"
            label = label_of.get(annotation.get("category_id"))
            if label is None:
                raise ValueError(
                    f"{where} in {file} has the category id {annotation.get('category_id')!r}; "
                    f"the categories of the file are {categories.by_id}"
                )
            box = checks.box(annotation.get("bbox"), "coco", size, where)
            if box is not None:
                boxes.append(box)
                areas.append(float(annotation.get("area") or (box[2] - box[0]) * (box[3] - box[1])))
                labels.append(label)
                crowds.append(bool(annotation.get("iscrowd", 0)))
        rows.append(_annotated(key, str(root / str(image["file_name"])), size, boxes, labels, areas, crowds))
    return DetectionSplit(rows, f"{file.name} of {folder}", dropped=checks.finish()), categories


def _parse(file: Path) -> Any:
    if file.stat().st_size == 0:
        raise ValueError(f"the annotation file {file} is empty")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"the annotation file {file} is no JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file} is no COCO annotation file: it has no list of {key}")
    for key in ("images", "categories"):
        if not content[key]:
            raise ValueError(f"the annotation file {file} has no {key}")
    return content


def _coco_categories(listed: list[Any], file: Path) -> Categories:
    try:
        by_id = {int(category["id"]): str(category["name"]) for category in listed}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a category of {file} has no id or name: {listed}") from error
    if len(by_id) != len(listed):
        raise ValueError(f"two categories of {file} have one id: {listed}")
    return Categories([by_id[key] for key in sorted(by_id)], sorted(by_id))


def _image_root(file: Path, folder: Path, given: Optional[str], names: list[str]) -> Path:
    stem = file.stem.removeprefix("instances_")
    places = [folder / "images", folder / "images" / stem, folder / stem, file.parent, folder]
    if given is not None:
        places = [Path(given).expanduser(), folder / given]
    root = next((place for place in places if (place / names[0]).is_file()), None)
    if root is None:
        raise FileNotFoundError(
            f"image {names[0]} of {file} is in none of {', '.join(map(str, dict.fromkeys(places)))}; say where images "
            "are with --image-folder"
        )
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images of {file} are not in {root}: {', '.join(missing[:8])}"
        )
    return root


# ------------------------------------------------------------------------------------------ tables


def _read_table(table: Any, name: str, box_format: str, drop: bool) -> tuple[DetectionSplit, Categories]:
    features = table.features
    image = next((key for key, feature in features.items() if isinstance(feature, datasets.Image)), None)
    objects = next((key for key in ("objects", "annotations", "faces") if key in features), None)
    if image is None or objects is None:
        raise ValueError(
            f"{name} has the columns {', '.join(features)}; detection needs one of images and one named objects, with "
            "bbox and category. For a folder of images, give COCO annotation files"
        )
    if len(table) == 0:
        raise ValueError(f"{name} is empty")
    inner = _inner_features(features[objects])
    box_key = _key(inner, ("bbox", "boxes", "box"), f"{objects} of {name}")
    label_key = _key(inner, ("category", "categories", "category_id", "label", "labels"), f"{objects} of {name}")
    keep = [key for key in (objects, "image_id", "width", "height") if key in features]
    listed = table.select_columns(keep)
    undecoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    undecoded = undecoded.rename_column(image, "image") if image != "image" else undecoded
    names = _table_names(inner[label_key], listed, objects, label_key)
    label_of: Mapping[Any, int] = {**{k: k + 1 for k in range(len(names))}, **{n: k + 1 for k, n in enumerate(names)}}
    checks = _Checks(name, drop)
    rows = []
    for number, row in enumerate(listed):
        things = _by_column(row[objects])
        size = _table_size(row, undecoded, number, name)
        boxes, areas, labels, crowds = [], [], [], []
        for k, (box, label) in enumerate(zip(things.get(box_key, []), things.get(label_key, []), strict=True)):
            where = f"object {k} of row {number}"
            if label not in label_of or isinstance(label, bool):
                raise ValueError(f"{where} of {name} has the category {label!r}; there are {names}")
            checked = checks.box(box, box_format, size, where)
            if checked is not None:
                boxes.append(checked)
                areas.append((checked[2] - checked[0]) * (checked[3] - checked[1]))
                labels.append(label_of[label])
                crowd = things.get("iscrowd") or things.get("is_crowd")
                crowds.append(bool(crowd[k]) if crowd else False)
        rows.append(_annotated(row.get("image_id", number), number, size, boxes, labels, areas, crowds))
    return DetectionSplit(rows, name, undecoded, checks.finish()), Categories(names, list(range(len(names))))


def _inner_features(feature: Any) -> dict[str, Any]:
    """Of a list of dicts, or a dict of lists: {key: feature of one object}."""
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, (list, tuple)):
        inner = inner[0]
    if not isinstance(inner, dict):
        raise ValueError(f"objects must be a list of dicts or a dict of lists, not {feature}")
    if inner is feature:
        return {key: getattr(value, "feature", value) for key, value in inner.items()}
    return dict(inner)


def _key(inner: Mapping[str, Any], usual: Sequence[str], where: str) -> str:
    found = next((key for key in usual if key in inner), None)
    if found is None:
        near = difflib.get_close_matches(usual[0], inner, n=1, cutoff=0.0)
        raise ValueError(f"{where} has {', '.join(inner)}, but no {usual[0]} ({near[0]} is the nearest)")
    return found


def _by_column(things: Any) -> dict[str, list[Any]]:
    if isinstance(things, Mapping):
        return {key: list(value) for key, value in things.items()}
    things = list(things or [])
    return {key: [thing[key] for thing in things] for key in (things[0] if things else {})}


def _table_names(feature: Any, listed: Any, objects: str, label_key: str) -> list[str]:
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = {value for row in listed for value in _by_column(row[objects]).get(label_key, [])}
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    return [str(k) for k in range(max((int(value) for value in values), default=-1) + 1)]


def _table_size(row: Mapping[str, Any], undecoded: Any, number: int, name: str) -> tuple[int, int]:
    if row.get("width") and row.get("height"):
        return int(row["height"]), int(row["width"])
    value = undecoded[number]["image"]
    try:
        with Pillow.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]) as opened:
            return opened.height, opened.width
    except FileNotFoundError:
        raise
    except (OSError, Pillow.DecompressionBombError) as error:
        raise ValueError(f"the image of row {number} of {name} can't be read: {error}") from error


# ------------------------------------------------------------------------------------------ boxes


def to_corners(box: Sequence[float], box_format: str, size: tuple[int, int]) -> list[float]:
    """A box in one of ``BOX_FORMATS`` as [left, top, right, bottom] in pixels; ``size`` is (height, width)."""
    a, b, c, d = box
    if box_format == "coco":
        return [a, b, a + c, b + d]
    if box_format == "voc":
        return [a, b, c, d]
    height, width = size
    return [(a - c / 2) * width, (b - d / 2) * height, (a + c / 2) * width, (b + d / 2) * height]


class _Checks:
    """Boxes of one file: bad ones are collected, then refused together, or counted."""

    def __init__(self, name: str, drop: bool) -> None:
        self.name, self.drop = name, drop
        self.bad: list[str] = []

    def box(self, given: Any, box_format: str, size: tuple[int, int], where: str) -> Optional[list[float]]:
        """The box's corners, clipped to the image; None if it can't be one."""
        try:
            numbers = [float(value) for value in given]
            corners = to_corners(numbers, box_format, size)
        except (TypeError, ValueError):
            return self._refuse(f"{where} has the box {given!r}, which is not four numbers")
        height, width = size
        left, top, right, bottom = corners
        if not all(math.isfinite(value) for value in corners) or right <= left or bottom <= top:
            return self._refuse(f"{where} has the box {numbers}, of zero or negative size")
        if left < -SLACK or top < -SLACK or right > width + SLACK or bottom > height + SLACK:
            return self._refuse(f"{where} has the box {numbers}, outside its image of {width} x {height}")
        left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)
        if right <= left or bottom <= top:
            return self._refuse(f"{where} has the box {numbers}, outside its image of {width} x {height}")
        return [left, top, right, bottom]

    def _refuse(self, line: str) -> Optional[list[float]]:
        self.bad.append(line)
        return None

    def finish(self) -> int:
        """How many were left out; ValueError if that was not asked for."""
        if self.bad and not self.drop:
            lines = "\n  ".join(self.bad[:8])
            raise ValueError(
                f"{self.name} has {len(self.bad)} bad boxes (--drop-bad-boxes leaves them out):\n  {lines}"
                + ("\n  ..." if len(self.bad) > 8 else "")
            )
        return len(self.bad)


def _annotated(
    image_id: Any, place: Any, size: tuple[int, int], boxes: Any, labels: Any, areas: Any, crowds: Any
) -> Annotated:
    return Annotated(
        image_id,
        place,
        size,
        np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        np.asarray(labels, dtype=np.int64),
        np.asarray(areas, dtype=np.float32),
        np.asarray(crowds, dtype=bool),
    )
