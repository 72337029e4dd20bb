"""Data sets with a column of images and a column of objects: of the Hub, Parquet, or saved by ``save_to_disk``."""

import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel
from PIL import Image as Pillow

from dg_timm._errors import BadValue
from dg_timm.detection.data.boxes import (
    BoxValidator,
    Categories,
    DetectionSplit,
    ImageAnnotations,
    box_area,
    make_annotations,
    read_area,
    read_crowd,
)
from dg_timm.detection.data.digits import digit_pages
from dg_timm.training.data.opening import open_source

OBJECT_COLUMNS = ("objects", "annotations", "faces")
BOX_KEYS = ("bbox", "boxes", "box")
CATEGORY_KEYS = ("category", "categories", "category_id", "label", "labels")
CROWD_KEYS = ("iscrowd", "is_crowd")


def open_tables(source: str) -> dict[str, Any]:
    """Open every split of a data set, by name; ``digits`` makes pages of handwritten digits."""
    if source == "digits":
        return digit_pages()
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().exists():
        raise BadValue(f"no such folder: {source}; give a folder with images and COCO annotation files")
    return open_source(source, streaming=False).parts


class ColumnTable:
    """One split of ``datasets``, with a column of images and one of objects.

    Args:
        table: the split.
        name: how messages call it.

    Attributes:
        table: the split, as it was given.
        class_names: the names of the classes, where the column is a ``ClassLabel``; otherwise None.

    Raises:
        BadValue: the split is empty, or a column or key is missing.
    """

    def __init__(self, table: Any, name: str) -> None:
        self.name, self.table = name, table
        features = table.features
        image = next((key for key, feature in features.items() if isinstance(feature, datasets.Image)), None)
        objects = next((key for key in OBJECT_COLUMNS if key in features), None)
        if image is None or objects is None:
            raise BadValue(
                f"{name} has the columns {', '.join(features)}; detection needs a column of images and one named "
                "objects, with bbox and category. For a folder of images, give COCO annotation files"
            )
        if len(table) == 0:
            raise BadValue(f"{name} is empty")
        self.objects = objects
        inner = _object_features(features[objects])
        self.box_key = _find_key(inner, BOX_KEYS, f"{objects} of {name}")
        self.category_key = _find_key(inner, CATEGORY_KEYS, f"{objects} of {name}")
        feature = inner[self.category_key]
        self.class_names: list[str] | None = list(feature.names) if isinstance(feature, ClassLabel) else None
        self.listed = table.select_columns([key for key in (objects, "image_id", "width", "height") if key in features])
        undecoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self.undecoded = undecoded.rename_column(image, "image") if image != "image" else undecoded

    def values(self) -> set[Any]:
        """Every category that an object of the split has, as it is stored."""
        return {value for row in self.listed for value in _by_key(row[self.objects]).get(self.category_key, [])}

    def read(self, categories: Categories, box_format: str, drop: bool) -> DetectionSplit:
        """Read all annotations; no image is decoded.

        Args:
            categories: the classes; objects may name them or give their numbers.
            box_format: one of ``BOX_FORMATS``.
            drop: leave bad boxes out instead of refusing them.

        Raises:
            BadValue: a box is bad, a category is unknown, or an image whose size is not stored can't be read.
        """
        own = None if self.class_names is None else categories.labels_of(dict(enumerate(self.class_names)))
        label_of: Mapping[Any, int] = {
            **(own or {category: label for label, category in enumerate(categories.ids, start=1)}),
            **{name: label for label, name in enumerate(categories.names, start=1)},
        }
        validator = BoxValidator(self.name, drop)
        rows = [self._annotate(row, k, label_of, box_format, validator) for k, row in enumerate(self.listed)]
        return DetectionSplit(rows, self.name, self.undecoded, validator.finish())

    def _annotate(
        self, row: Mapping[str, Any], number: int, label_of: Mapping[Any, int], box_format: str, validator: BoxValidator
    ) -> ImageAnnotations:
        things = _by_key(row[self.objects])
        size = self._image_size(row, number)
        given, kinds = things.get(self.box_key) or [], things.get(self.category_key) or []
        if len(given) != len(kinds):
            raise BadValue(f"row {number} of {self.name} has {len(given)} boxes and {len(kinds)} categories")
        stored_areas = things.get("area") or [None] * len(given)
        stored_crowds = next((things[key] for key in CROWD_KEYS if things.get(key)), [False] * len(given))
        boxes, areas, labels, crowds = [], [], [], []
        for k, (box, kind) in enumerate(zip(given, kinds, strict=True)):
            where = f"object {k} of row {number}"
            place = f"{where} of {self.name}"
            if isinstance(kind, bool) or not isinstance(kind, (int, str)) or kind not in label_of:
                names = [name for name in label_of if isinstance(name, str)]
                raise BadValue(f"{place} has the category {kind!r}; there are {names}")
            area, crowd = read_area(stored_areas[k], place), read_crowd(stored_crowds[k], place)
            checked = validator.check(box, box_format, size, where)
            if checked is not None:
                boxes.append(checked)
                areas.append(area or box_area(checked))
                labels.append(label_of[kind])
                crowds.append(crowd)
        image_id = row.get("image_id")
        return make_annotations(number if image_id is None else image_id, number, size, boxes, labels, areas, crowds)

    def _image_size(self, row: Mapping[str, Any], number: int) -> tuple[int, int]:
        if row.get("width") and row.get("height"):
            return int(row["height"]), int(row["width"])
        value = self.undecoded[number]["image"]
        try:
            with Pillow.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]) as opened:
                return opened.height, opened.width
        except Exception as error:  # decoders raise anything
            raise BadValue(f"the image of row {number} of {self.name} can't be read: {error}") from error


def table_categories(train: ColumnTable, test: ColumnTable) -> tuple[Categories, Categories]:
    """The classes of both splits.

    Where both have a ``ClassLabel`` and the split to evaluate on knows others, each has its own; otherwise they share
    those to train on, those of the one that has a ``ClassLabel``, or else every category that any object has.
    """
    if train.class_names is not None and test.class_names is not None:
        both = [Categories(names, list(range(len(names)))) for names in (train.class_names, test.class_names)]
        shared_names = both[0].labels_of(both[1].by_id) is not None
        return both[0], both[0] if shared_names else both[1]
    names = train.class_names or test.class_names
    values = train.values() | test.values()
    if names is None and all(isinstance(value, str) for value in values):
        names = sorted(values)
    if names is None:
        numbers = [value for value in values if isinstance(value, int)]
        names = [str(k) for k in range(max(numbers, default=-1) + 1)]
    shared = Categories(names, list(range(len(names))))
    return shared, shared


def _object_features(feature: Any) -> dict[str, Any]:
    """The features of one object, by key, of a list of dicts or a dict of lists."""
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, (list, tuple)):
        inner = inner[0]
    if not isinstance(inner, dict):
        raise BadValue(f"objects must be a list of dicts or a dict of lists, not {feature}")
    if inner is feature:
        return {key: getattr(value, "feature", value) for key, value in inner.items()}
    return dict(inner)


def _find_key(inner: Mapping[str, Any], usual: Sequence[str], where: str) -> str:
    found = next((key for key in usual if key in inner), None)
    if found is None:
        near = difflib.get_close_matches(usual[0], inner, n=1, cutoff=0.0)
        hint = f" ({near[0]} is the nearest)" if near else ""
        raise BadValue(f"{where} has the keys {', '.join(inner) or 'none'}, but no {usual[0]}{hint}")
    return found


def _by_key(things: Any) -> dict[str, list[Any]]:
    """Objects, given as a list of dicts or a dict of lists, as a dict of lists."""
    if isinstance(things, Mapping):
        return {key: list(value) for key, value in things.items()}
    things = list(things or [])
    return {key: [thing[key] for thing in things] for key in (things[0] if things else {})}
