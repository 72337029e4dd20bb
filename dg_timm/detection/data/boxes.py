"""Annotated images, as every source of data gives them; each box is checked once, here."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dg_timm._errors import BadValue

BOX_FORMATS = ("coco", "voc", "yolo")
SLACK_PIXELS = 1.0  # rounding may take a box this far over the edge of its image; it is clipped
_MAX_BOXES_SHOWN = 8


class Categories(NamedTuple):
    """The classes of a data set. Label k + 1 stands for the k-th one; label 0 is the background.

    Attributes:
        names: the name of each class.
        ids: the number that the data set itself gives each class; numbers may be missing.
    """

    names: list[str]
    ids: list[int]

    @property
    def by_id(self) -> dict[int, str]:
        """The names of the classes by the data set's own numbers."""
        return dict(zip(self.ids, self.names, strict=True))

    def labels_of(self, names: Mapping[int, str]) -> dict[int, int] | None:
        """Find the label of every class of a data set by its name; None if one is unknown or names are not unique.

        Args:
            names: of the data set's classes, by its own numbers.
        """
        label_of = {name: label for label, name in enumerate(self.names, start=1)}
        if len(label_of) != len(self.names) or not set(names.values()) <= set(label_of):
            return None
        return {number: label_of[name] for number, name in names.items()}


class ImageAnnotations(NamedTuple):
    """What is known of one image, which is decoded later.

    Attributes:
        image_id: the data set's own name or number of the image.
        source: path of the image file, or the image's row in ``DetectionSplit.table``.
        size: (height, width) in pixels.
        boxes: (n, 4) float32, [left, top, right, bottom] in pixels; n may be 0.
        labels: (n,) int64, from 1 on.
        area: (n,) float32, square pixels; COCO's metrics tell small objects from large ones by it.
        crowd: (n,) bool. A crowd is a group of objects: it is not learned, and detecting it is neither right nor wrong.
    """

    image_id: Any
    source: Any
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    crowd: np.ndarray


class DetectionSplit(NamedTuple):
    """One split of a data set.

    Attributes:
        rows: the annotations of each image.
        name: how messages call the split.
        table: the undecoded images, in a column ``image``; None where images are files.
        dropped: how many bad boxes were left out.
        folder: that holds the images of a COCO file; None elsewhere.
        streamed: always False: detection reads all annotations before it starts.
    """

    rows: list[ImageAnnotations]
    name: str
    table: Any = None
    dropped: int = 0
    folder: Path | None = None
    streamed: bool = False

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self.rows)

    @property
    def boxes(self) -> int:
        """The number of boxes that are learned, or to be found: all but crowds."""
        return sum(int((~row.crowd).sum()) for row in self.rows)

    def select(self, rows: Sequence[int]) -> "DetectionSplit":
        """The same split with these images only."""
        return self._replace(rows=[self.rows[row] for row in rows])


class DetectionSplits(NamedTuple):
    """Both splits of a data set, the classes of their boxes, and what was left out of them, in words."""

    train: DetectionSplit
    test: DetectionSplit
    categories: Categories
    left_out: tuple[str, ...] = ()


def to_corners(box: Sequence[float], box_format: str, size: tuple[int, int]) -> list[float]:
    """Convert a box from one of ``BOX_FORMATS`` to [left, top, right, bottom] in pixels.

    Args:
        box: ``coco``: [left, top, width, height] in pixels; ``voc``: [left, top, right, bottom] in pixels;
            ``yolo``: [center x, center y, width, height] as fractions of the image.
        size: (height, width) of the image in pixels.
    """
    a, b, c, d = box
    if box_format == "coco":
        return [a, b, a + c, b + d]
    if box_format == "voc":
        return [a, b, c, d]
    height, width = size
    return [(a - c / 2) * width, (b - d / 2) * height, (a + c / 2) * width, (b + d / 2) * height]


class BoxValidator:
    """Checks the boxes of one split. Bad ones are collected, then refused together, or counted.

    Args:
        name: how messages call the split.
        drop: leave bad boxes out instead of refusing them.
    """

    def __init__(self, name: str, drop: bool) -> None:
        self.name, self.drop = name, drop
        self.bad: list[str] = []

    def check(self, given: Any, box_format: str, size: tuple[int, int], where: str) -> list[float] | None:
        """Return a box as [left, top, right, bottom] in pixels, clipped to its image; None if it is bad.

        Args:
            given: what the data set has as a box.
            box_format: one of ``BOX_FORMATS``.
            size: (height, width) of the image in pixels.
            where: how messages call the box.
        """
        try:
            if isinstance(given, (str, bytes)) or any(isinstance(value, bool) for value in given):
                raise TypeError("no numbers")
            numbers = [float(value) for value in given]
            # checked in the precision in which boxes are kept: a very thin box may vanish in float32
            corners = [float(value) for value in np.asarray(to_corners(numbers, box_format, size), dtype=np.float32)]
        except (TypeError, ValueError):
            return self._refuse(f"{where} has the box {given!r}, which is not four numbers")
        height, width = size
        left, top, right, bottom = corners
        if not all(math.isfinite(value) for value in corners) or right <= left or bottom <= top:
            return self._refuse(f"{where} has the box {numbers}, of zero or negative size")
        clipped = [max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)]
        moved = max(abs(before - after) for before, after in zip(corners, clipped, strict=True))
        if moved > SLACK_PIXELS or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            return self._refuse(f"{where} has the box {numbers}, outside its image of {width} x {height}")
        return clipped

    def _refuse(self, line: str) -> list[float] | None:
        self.bad.append(line)
        return None

    def finish(self) -> int:
        """Return how many bad boxes were left out.

        Raises:
            BadValue: there are bad boxes, and ``drop`` is False; the message names the first ones.
        """
        if self.bad and not self.drop:
            lines = "\n  ".join(self.bad[:_MAX_BOXES_SHOWN])
            raise BadValue(
                f"{self.name} has {len(self.bad)} bad boxes (--drop-bad-boxes leaves them out):\n  {lines}"
                + ("\n  ..." if len(self.bad) > _MAX_BOXES_SHOWN else "")
            )
        return len(self.bad)


def box_area(box: Sequence[float]) -> float:
    """The area of a box [left, top, right, bottom], in square pixels."""
    return (box[2] - box[0]) * (box[3] - box[1])


def read_crowd(value: Any, where: str) -> bool:
    """Read whether a box is a crowd: 0 or 1, also as text; nothing is no crowd.

    Raises:
        BadValue: anything else, naming ``where``.
    """
    text = str(value).strip().lower()
    if text in ("0", "0.0", "false", "none", ""):
        return False
    if text in ("1", "1.0", "true"):
        return True
    raise BadValue(f"{where} has the iscrowd {value!r}, which is neither 0 nor 1")


def read_area(value: Any, where: str) -> float | None:
    """Read the area of a box, in square pixels, also as text; None where it is not known (0, or nothing).

    Raises:
        BadValue: anything else, naming ``where``.
    """
    if value is None or value == "":
        return None
    try:
        area = float(value)
    except (TypeError, ValueError):
        area = math.nan
    if isinstance(value, bool) or not math.isfinite(area) or area < 0:
        raise BadValue(f"{where} has the area {value!r}")
    return area or None


def make_annotations(
    image_id: Any, source: Any, size: tuple[int, int], boxes: Any, labels: Any, areas: Any, crowds: Any
) -> ImageAnnotations:
    """Build :class:`ImageAnnotations` from lists, which may be empty."""
    return ImageAnnotations(
        image_id,
        source,
        size,
        np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        np.asarray(labels, dtype=np.int64),
        np.asarray(areas, dtype=np.float32),
        np.asarray(crowds, dtype=bool),
    )
