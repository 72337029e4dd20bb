"""What a detection data set holds, in a line and in a picture, before anything is trained on it."""

from collections import Counter
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from dg_timm.detection.data.boxes import Categories, DetectionSplit, DetectionSplits
from dg_timm.detection.data.loading import read_image
from dg_timm.training.data.summary import describe_parts, draw_sheet, sample_places

_LINE = 1 / 80  # width of a box's outline, of the image's longer side


def describe_detection_data(splits: DetectionSplits, source: str) -> str:
    """Write one line: the source, images and boxes of each split, the classes, and what was left out."""
    train = f"{_rows(splits.train)} to train on, " if splits.train.rows else ""
    rows = f"{train}{_rows(splits.test)} to evaluate on ({splits.test.name})"
    return describe_parts(source, rows, splits.categories.names, splits.left_out)


def _rows(split: DetectionSplit) -> str:
    return f"{split.size} images with {split.boxes} boxes"


def draw_detection_samples(split: DetectionSplit, categories: Categories, file: Path) -> int:
    """Save a picture of at most 16 samples from all over a split, with their boxes and classes; count them.

    Raises:
        BadValue: the picture can't be written.
    """
    places = sample_places(split.size)
    draw_sheet([(partial(_draw, split, row), _caption(split, row, categories)) for row in places], file)
    return len(places)


def _draw(split: DetectionSplit, row: int) -> Image.Image:
    image, boxes = read_image(split, row), torch.from_numpy(split.rows[row].boxes)
    width = max(1, round(max(image.size) * _LINE))
    drawn = draw_bounding_boxes(pil_to_tensor(image), boxes, colors="red", width=width) if len(boxes) else None
    return image if drawn is None else to_pil_image(drawn)


def _caption(split: DetectionSplit, row: int, categories: Categories) -> str:
    counts = Counter(categories.names[label - 1] for label in split.rows[row].labels.tolist())
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no box"
