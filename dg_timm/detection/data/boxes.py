"""Images and their boxes, as every source gives them; every box is checked once, here."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

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


def to_corners(box: Sequence[float], box_format: str, size: tuple[int, int]) -> list[float]:
    """A box in one of ``BOX_FORMATS`` as [left, top, right, bottom] in pixels; ``size`` is (height, width)."""
    a, b, c, d = box
    if box_format == "coco":
        return [a, b, a + c, b + d]
    if box_format == "voc":
        return [a, b, c, d]
    height, width = size
    return [(a - c / 2) * width, (b - d / 2) * height, (a + c / 2) * width, (b + d / 2) * height]


class Checks:
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


def area_of(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def annotated(
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
