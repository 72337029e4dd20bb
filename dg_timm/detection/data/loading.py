"""Decode and augment annotated images, and put them together in batches.

Which images form a batch is decided as in :mod:`dg_timm.training.data.samplers`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from PIL import Image as Pillow
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dg_timm.detection.data.boxes import DetectionSplit
from dg_timm.training.data.decoding import decode_image, describe
from dg_timm.training.data.images import Unreadable
from dg_timm.training.data.samplers import SampleKey
from dg_timm.training.data.seeding import seeded

Target = dict[str, Tensor]  # boxes (n, 4) float32, [left, top, right, bottom] in pixels; labels (n,) int64, from 1 on


class DetectionBatch(NamedTuple):
    """A batch of a fixed number of images.

    Attributes:
        images: (3, height, width) float32 in 0..1, each of its own size.
        targets: the boxes and labels of each image.
        sample_mask: (batch,) float32; 0 for a row that only fills the batch up, otherwise 1.
        rows: (batch, 2) int64; 0, and the row of the image in its split.
        unreadable: a line for every row whose image can't be decoded.
        row_errors: a line for every row whose image has another size than its annotation says.
    """

    images: list[Tensor]
    targets: list[Target]
    sample_mask: Tensor
    rows: Tensor
    unreadable: list[str]
    row_errors: list[str]

    @property
    def passing(self) -> list[int]:
        """Which images pass the detector in training: those that count; if none counts, one, which has gradients."""
        found: list[int] = self.sample_mask.nonzero()[:, 0].tolist()
        return found or [0]

    def masked_out(self) -> "DetectionBatch":
        """Return the same images, none of which counts."""
        return self._replace(sample_mask=torch.zeros_like(self.sample_mask), unreadable=[], row_errors=[])

    def move_to(self, device: torch.device, layout: torch.memory_format) -> "DetectionBatch":
        """Return the same batch on a device. ``layout`` is ignored: the detector stacks images, and lays them out."""
        moved: DetectionBatch = send_to_device(self, device, non_blocking=True)
        return moved


class DetectionImages(Dataset[Any]):
    """Decodes and transforms the images of a split; workers of a loader call it.

    An item is (image, target, key), an :class:`Unreadable`, or a text that says how image and annotation disagree.

    Args:
        split: the annotated images.
        transform: maps (image, {boxes, labels}) to the same; from :func:`make_transform`.
        seed: the seed of the augmentation; None if ``transform`` is not random.
    """

    def __init__(self, split: DetectionSplit, transform: Callable[..., Any], seed: int | None = None) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Target, SampleKey] | Unreadable | str:
        row = self.split.rows[key.row]
        where = f"image {row.image_id} of {self.split.name}" + (
            f" ({row.source})" if isinstance(row.source, str) else ""
        )
        try:
            image = read_image(self.split, key.row)
        except Exception as error:  # decoders raise anything
            return Unreadable(f"{where}: {describe(error)}")
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
    """Decode the image of a row as RGB.

    Annotators see an image with or without its EXIF orientation; it is applied where the annotated size asks for it.
    """
    annotations = split.rows[row]
    value = annotations.source if split.table is None else split.table[annotations.source]["image"]
    image = decode_image(value, "RGB", turn=False)
    return image if image.size == annotations.size[::-1] else decode_image(value, "RGB")


class Augmentation(NamedTuple):
    """The probability of each random change of an image and its boxes, 0..1.

    Attributes:
        hflip: flip left and right.
        vflip: flip top and bottom.
        photometric: change brightness, contrast, saturation, hue and the order of the channels.
        crop: crop so that some boxes stay well inside (as SSD does, by overlap). Boxes whose center lies outside the
            crop are dropped.
        zoom_out: place the image on a larger canvas.
    """

    hflip: float = 0.5
    vflip: float = 0.0
    photometric: float = 0.0
    crop: float = 0.0
    zoom_out: float = 0.0


def make_transform(augmentation: Augmentation | None = None) -> Any:
    """Build torchvision's transform of an image and its boxes; the image becomes float32 in 0..1.

    Args:
        augmentation: the random changes; None leaves image and boxes as they are.
    """
    steps: list[Any] = []
    if augmentation is not None:
        a = augmentation
        steps += [v2.RandomPhotometricDistort(p=a.photometric)] if a.photometric else []
        steps += [v2.RandomZoomOut(p=a.zoom_out, side_range=(1.0, 2.0))] if a.zoom_out else []
        steps += [v2.RandomApply([v2.RandomIoUCrop()], p=a.crop)] if a.crop else []
        steps += [v2.RandomHorizontalFlip(a.hflip)] if a.hflip else []
        steps += [v2.RandomVerticalFlip(a.vflip)] if a.vflip else []
        steps += [v2.SanitizeBoundingBoxes(min_size=1)]  # a crop may leave less than a pixel of a box
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


class DetectionCollate:
    """Puts rows together in a :class:`DetectionBatch` of a fixed number of images.

    A short batch is filled up with its own images, so that padding, and with it rounding, depends on nothing else.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __call__(self, rows: list[Any]) -> DetectionBatch:
        """Batch the items of :class:`DetectionImages`; without a readable row, no image of the batch counts."""
        good = [row for row in rows if type(row) is tuple]
        mask = torch.zeros(self.batch_size)
        mask[: len(good)] = 1.0
        blank = (torch.zeros(3, 64, 64), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)})
        shown = [good[k % len(good)] for k in range(self.batch_size)] if good else [blank] * self.batch_size
        return DetectionBatch(
            [row[0] for row in shown],
            [row[1] for row in shown],
            mask,
            torch.tensor([[0, row[2].row] for row in shown] if good else [[-1, -1]] * self.batch_size),
            [row.where for row in rows if isinstance(row, Unreadable)],
            [row for row in rows if isinstance(row, str)],
        )
