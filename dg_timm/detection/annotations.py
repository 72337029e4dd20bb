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
        """Those that are learned, or to be found: no crowds."""
        return sum(int((~row.crowd).sum()) for row in self.rows)

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
    known: Optional[Categories] = None,
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
        known: the categories of a detector that is to be evaluated; nothing is then loaded to train on.

    Raises:
        FileNotFoundError: naming a folder, an annotation file or an image that is not there.
        ValueError: naming what is empty, malformed, unknown, or a box that can't be one.
    """
    folder = Path(source).expanduser()
    other = Path(val_source).expanduser() if val_source else folder
    train = DetectionSplit([], f"nothing of {source}")
    if any(_annotation_files(place) for place in (folder, other)) or train_annotations or val_annotations:
        if known is None:
            train_file = _annotation_file(folder, train_split, TRAIN_SPLITS, train_annotations)
            if train_file is None:
                what = train_split or "train"
                raise FileNotFoundError(
                    f"{folder} has no annotation file for {what}{_beside(folder)}; name it with --train-annotations, "
                    "or its split with --train-split"
                )
            train, known = _read_coco(train_file, folder, image_folder, drop_bad_boxes)
        val_file = _annotation_file(other, val_split, HELD_OUT_SPLITS, val_annotations)
        if val_file is None:
            raise FileNotFoundError(
                f"{other} has no annotation file to evaluate on{_beside(other)}; name it with --val-annotations, or "
                "its split with --val-split"
            )
        test, theirs = _read_coco(val_file, other, image_folder, drop_bad_boxes)
    else:
        parts = _open_tables(source)
        others = _open_tables(val_source) if val_source else parts
        val_rows = pick_split(others, val_split, HELD_OUT_SPLITS, val_source or source, "--val-split")
        if val_rows is None:
            raise ValueError(f"{val_source or source} has the splits {', '.join(others)}; choose one with --val-split")
        val_table = _Table(val_rows, f"the evaluation split of {val_source or source}")
        if known is None:
            train_rows = pick_split(parts, train_split, TRAIN_SPLITS, source, "--train-split")
            if train_rows is None:
                raise ValueError(f"{source} has the splits {', '.join(parts)}; choose one with --train-split")
            train_table = _Table(train_rows, f"the training split of {source}")
            known, theirs = _table_categories(train_table, val_table)
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


def _annotation_files(folder: Path) -> list[str]:
    """JSON files in a folder, but for those of ``save_to_disk``: it is a COCO data set if it has any."""
    others = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
    if not folder.is_dir() or (folder / others[0]).exists() or (folder / others[1]).exists():
        return []
    found = [*folder.glob("*.json"), *folder.glob("annotations/*.json"), *folder.glob("*/_annotations.coco.json")]
    return sorted(str(file.relative_to(folder)) for file in found if file.name not in others)


def _beside(folder: Path) -> str:
    found = _annotation_files(folder)[:8]
    return f" (there are {', '.join(found)})" if found else ""


def _read_coco(file: Path, folder: Path, image_folder: Optional[str], drop: bool) -> tuple[DetectionSplit, Categories]:
    content = _parse(file)
    categories = _coco_categories(content["categories"], file)
    label_of = {category: label for label, category in enumerate(categories.ids, start=1)}
    images: dict[Any, Any] = {}
    for image in content["images"]:
        if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)):
            raise ValueError(f"an image of {file} has no id: {image!r}")
        for key, kind in (("file_name", str), ("width", int), ("height", int)):
            if not isinstance(image.get(key), kind) or not image[key]:
                raise ValueError(f"image {image['id']} of {file} has the {key} {image.get(key)!r}")
        if image["id"] in images:
            raise ValueError(f"{file} has two images with the id {image['id']}")
        images[image["id"]] = image
    of_image: dict[Any, list[Any]] = {key: [] for key in images}
    for annotation in content["annotations"]:
        if not isinstance(annotation, dict):
            raise ValueError(f"an annotation of {file} is {annotation!r}")
        owner = annotation.get("image_id")
        if not isinstance(owner, (int, str)) or owner not in of_image:
            raise ValueError(
                f"annotation {annotation.get('id')} of {file} is of image {owner!r}, which is not among its images"
            )
        of_image[owner].append(annotation)
    root = _image_root(file, folder, image_folder, [image["file_name"] for image in images.values()])
    checks = _Checks(file.name, drop)
    rows = []
    for key, image in images.items():
        size = (image["height"], image["width"])
        boxes, areas, labels, crowds = [], [], [], []
        for annotation in of_image[key]:
            where = f"annotation {annotation.get('id')} of image {key} ({image['file_name']})"
            category, area = annotation.get("category_id"), annotation.get("area")
            label = label_of.get(category) if isinstance(category, int) else None
            if label is None:
                raise ValueError(
                    f"{where} in {file} has the category id {category!r}; the categories of the file are "
                    f"{categories.by_id}"
                )
            if area is not None and not isinstance(area, (int, float)):
                raise ValueError(f"{where} in {file} has the area {area!r}")
            box = checks.box(annotation.get("bbox"), "coco", size, where)
            if box is not None:
                boxes.append(box)
                areas.append(area or _area(box))
                labels.append(label)
                crowds.append(bool(annotation.get("iscrowd", 0)))
        rows.append(_annotated(key, str(root / image["file_name"]), size, boxes, labels, areas, crowds))
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
        places = [place for root in (Path(given).expanduser(), folder / given) for place in (root, root / stem)]
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


def _open_tables(source: str) -> dict[str, Any]:
    return digit_pages() if source == "digits" else load_parts(source, streaming=False)


class _Table:
    """A split of ``datasets`` with a column of images and one of objects."""

    def __init__(self, table: Any, name: str) -> None:
        self.table, self.name = table, name
        features = table.features
        image = next((key for key, feature in features.items() if isinstance(feature, datasets.Image)), None)
        objects = next((key for key in ("objects", "annotations", "faces") if key in features), None)
        if image is None or objects is None:
            raise ValueError(
                f"{name} has the columns {', '.join(features)}; detection needs one of images and one named objects, "
                "with bbox and category. For a folder of images, give COCO annotation files"
            )
        if len(table) == 0:
            raise ValueError(f"{name} is empty")
        self.objects = objects
        inner = _inner_features(features[objects])
        self.box_key = _key(inner, ("bbox", "boxes", "box"), f"{objects} of {name}")
        usual = ("category", "categories", "category_id", "label", "labels")
        self.label_key = _key(inner, usual, f"{objects} of {name}")
        feature = inner[self.label_key]
        self.class_names: Optional[list[str]] = list(feature.names) if isinstance(feature, ClassLabel) else None
        self.listed = table.select_columns([key for key in (objects, "image_id", "width", "height") if key in features])
        undecoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self.undecoded = undecoded.rename_column(image, "image") if image != "image" else undecoded

    def values(self) -> set[Any]:
        """Every category that an object has."""
        return {value for row in self.listed for value in _by_column(row[self.objects]).get(self.label_key, [])}

    def read(self, categories: Categories, box_format: str, drop: bool) -> DetectionSplit:
        names = categories.names
        label_of: Mapping[Any, int] = {
            **{category: k for k, category in enumerate(categories.ids, start=1)},
            **{name: k for k, name in enumerate(names, start=1)},
        }
        checks = _Checks(self.name, drop)
        rows = []
        for number, row in enumerate(self.listed):
            things = _by_column(row[self.objects])
            size = self._size(row, number)
            found, kinds = things.get(self.box_key) or [], things.get(self.label_key) or []
            if len(found) != len(kinds):
                raise ValueError(f"row {number} of {self.name} has {len(found)} boxes and {len(kinds)} categories")
            boxes, areas, labels, crowds = [], [], [], []
            for k, (box, label) in enumerate(zip(found, kinds, strict=True)):
                where = f"object {k} of row {number}"
                if isinstance(label, bool) or not isinstance(label, (int, str)) or label not in label_of:
                    raise ValueError(f"{where} of {self.name} has the category {label!r}; there are {names}")
                checked = checks.box(box, box_format, size, where)
                if checked is not None:
                    area = (things.get("area") or [None] * len(found))[k]
                    crowd = (things.get("iscrowd") or things.get("is_crowd") or [False] * len(found))[k]
                    boxes.append(checked)
                    areas.append(float(area) if isinstance(area, (int, float)) and area else _area(checked))
                    labels.append(label_of[label])
                    crowds.append(bool(crowd))
            image_id = row.get("image_id")
            rows.append(
                _annotated(number if image_id is None else image_id, number, size, boxes, labels, areas, crowds)
            )
        return DetectionSplit(rows, self.name, self.undecoded, checks.finish())

    def _size(self, row: Mapping[str, Any], number: int) -> tuple[int, int]:
        if row.get("width") and row.get("height"):
            return int(row["height"]), int(row["width"])
        value = self.undecoded[number]["image"]
        try:
            with Pillow.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]) as opened:
                return opened.height, opened.width
        except FileNotFoundError:
            raise
        except (OSError, Pillow.DecompressionBombError) as error:
            raise ValueError(f"the image of row {number} of {self.name} can't be read: {error}") from error


def _table_categories(train: _Table, test: _Table) -> tuple[Categories, Categories]:
    """Of both splits: their ClassLabel's, or else those that any object of either has."""
    if train.class_names is not None and test.class_names is not None:
        both = [Categories(names, list(range(len(names)))) for names in (train.class_names, test.class_names)]
        return both[0], both[1]
    named = train.class_names or test.class_names
    values = train.values() | test.values()
    if named is None and all(isinstance(value, str) for value in values):
        named = sorted(values)
    if named is None:
        numbers = [value for value in values if isinstance(value, int)]
        named = [str(k) for k in range(max(numbers, default=-1) + 1)]
    shared = Categories(named, list(range(len(named))))
    return shared, shared


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
            # as they are stored: what is thin enough may vanish in float32
            corners = [float(value) for value in np.asarray(to_corners(numbers, box_format, size), dtype=np.float32)]
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


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


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
