"""Detection data sets of the Hub, Parquet or ``save_to_disk``: a column of images, and one of objects."""

import difflib
import io
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import datasets
from datasets import ClassLabel
from PIL import Image as Pillow

from dg_timm.detection.data.boxes import Categories, Checks, DetectionSplit, annotated, area_of
from dg_timm.detection.data.digits import digit_pages
from dg_timm.training.data.sources import load_parts


def open_tables(source: str) -> dict[str, Any]:
    return digit_pages() if source == "digits" else load_parts(source, streaming=False)


class Table:
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
        checks = Checks(self.name, drop)
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
                    areas.append(float(area) if isinstance(area, (int, float)) and area else area_of(checked))
                    labels.append(label_of[label])
                    crowds.append(bool(crowd))
            image_id = row.get("image_id")
            rows.append(annotated(number if image_id is None else image_id, number, size, boxes, labels, areas, crowds))
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


def table_categories(train: Table, test: Table) -> tuple[Categories, Categories]:
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
