"""What an image and its boxes become, and batches of them. Rows are drawn as in :mod:`dg_timm.training.data.loading`."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import torch
from accelerate.utils import send_to_device
from PIL import Image as Pillow
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dg_timm.detection.data.boxes import DetectionSplit
from dg_timm.training.data.loading import Key, Unreadable, seeded

Target = dict[str, Tensor]  # boxes (n, 4) float32, [left, top, right, bottom] in pixels; labels (n,) int64, from 1 on


class DetectionBatch(NamedTuple):
    """A batch of a fixed number of images.

    Attributes:
        images: (3, height, width) float32 each, 0..1; every one of its own size.
        targets: their boxes and labels.
        weights: (batch,) float32; 0 for a row that only fills the batch up, otherwise 1.
        rows: (batch, 2) int64: 0, and the row in the split.
        unreadable, faults: a line for every row whose image can't be decoded, or is not as it was annotated.
    """

    images: list[Tensor]
    targets: list[Target]
    weights: Tensor
    rows: Tensor
    unreadable: list[str]
    faults: list[str]

    def without_weight(self) -> "DetectionBatch":
        """The same images, none of which counts."""
        return self._replace(weights=torch.zeros_like(self.weights), unreadable=[], faults=[])

    def on(self, device: torch.device, layout: torch.memory_format) -> "DetectionBatch":
        """The same batch on a device. The detector puts images together, and lays them out, itself."""
        moved: DetectionBatch = send_to_device(self, device, non_blocking=True)
        return moved


class DetectionImages(Dataset[Any]):
    """Decodes and transforms the rows of a split, in a worker.

    Args:
        transform: (image, {boxes, labels}) -> the same, of :func:`make_transform`.
        seed: of the augmentation; None if ``transform`` is not random.
    """

    def __init__(self, split: DetectionSplit, transform: Callable[..., Any], seed: Optional[int] = None) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __getitem__(self, key: Key) -> Union[tuple[Tensor, Target, Key], Unreadable, str]:
        row = self.split.rows[key.row]
        where = f"image {row.image_id} of {self.split.name}" + (f" ({row.place})" if isinstance(row.place, str) else "")
        try:
            image = read_image(self.split, key.row)
        except (OSError, SyntaxError, ValueError, TypeError, Pillow.DecompressionBombError) as error:
            return Unreadable(f"{where}: {error or type(error).__name__}")
        height, width = row.size
        if image.size != (width, height):
            return f"{where} is {image.width} x {image.height}, and its annotation says {width} x {height}"
        learned = ~row.crowd
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(row.boxes[learned]), format="XYXY", canvas_size=row.size)
        target = {"boxes": boxes, "labels": torch.from_numpy(row.labels[learned])}
        if self.seed is None:
            image, target = self.transform(tv_tensors.Image(image), target)
        else:
            with seeded(self.seed, key.epoch, key.shard, key.row, key.copy):
                image, target = self.transform(tv_tensors.Image(image), target)
        return image.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in target.items()}, key


def read_image(split: DetectionSplit, row: int) -> Pillow.Image:
    """The RGB image of a row, turned as its boxes are: annotators see it with or without its EXIF orientation."""
    annotated = split.rows[row]
    source: Any = annotated.place
    if split.table is not None:
        value = split.table[annotated.place]["image"]
        source = io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]
    with Pillow.open(source) as opened:
        image = opened.convert("RGB")
        if image.size != annotated.size[::-1]:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    return image


def make_transform(
    *, augment: bool = False, hflip: float = 0.5, vflip: float = 0.0, photometric: float = 0.0, crop: float = 0.0,
    zoom_out: float = 0.0,
) -> Any:  # fmt: skip
    """torchvision's transforms v2 of an image and its boxes, each applied with the probability given.

    Args:
        augment: False leaves image and boxes as they are.
        photometric: of changed brightness, contrast, saturation, hue and order of the channels.
        crop: of a crop that keeps some boxes well inside (SSD's, by overlap); boxes whose centre it loses are dropped.
        zoom_out: of placing the image on a larger canvas.
    """
    steps: list[Any] = []
    if augment:
        steps += [v2.RandomPhotometricDistort(p=photometric)] if photometric else []
        steps += [v2.RandomZoomOut(p=zoom_out, side_range=(1.0, 2.0))] if zoom_out else []
        steps += [v2.RandomApply([v2.RandomIoUCrop()], p=crop)] if crop else []
        steps += [v2.RandomHorizontalFlip(hflip)] if hflip else []
        steps += [v2.RandomVerticalFlip(vflip)] if vflip else []
        steps += [v2.SanitizeBoundingBoxes(min_size=1)]  # what a crop left of a box may be nothing
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


class DetectionCollate:
    """Rows -> :class:`DetectionBatch`, filled up to a fixed number: padding, and so rounding, stays the same."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __call__(self, rows: list[Any]) -> DetectionBatch:
        good = [row for row in rows if type(row) is tuple]
        weights = torch.zeros(self.batch_size)
        weights[: len(good)] = 1.0
        blank = (torch.zeros(3, 64, 64), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)})
        shown = [good[k % len(good)] for k in range(self.batch_size)] if good else [blank] * self.batch_size
        return DetectionBatch(
            [row[0] for row in shown],
            [row[1] for row in shown],
            weights,
            torch.tensor([[0, row[2].row] for row in shown] if good else [[-1, -1]] * self.batch_size),
            [row.where for row in rows if isinstance(row, Unreadable)],
            [row for row in rows if isinstance(row, str)],
        )
