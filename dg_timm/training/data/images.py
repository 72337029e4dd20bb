"""Decode and augment the images that keys name, and put them together in batches of a fixed size."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import Dataset

from dg_timm.training.data.decoding import decode_image, describe
from dg_timm.training.data.label_forms import Encoder, Target
from dg_timm.training.data.samplers import SampleKey
from dg_timm.training.data.seeding import seeded
from dg_timm.training.data.size_schedule import SizeSchedule
from dg_timm.training.data.splits import Split

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Batch(NamedTuple):
    """A batch of a fixed number of images.

    Attributes:
        images: (batch, channels, height, width) float32, normalized.
        labels: (batch,) int64; or (batch, classes) float32, of several classes or of soft labels.
        sample_mask: (batch,) float32; 0 for a row that only fills the batch up, otherwise 1.
        rows: (batch, 2) int64; the shard and the row of every image.
        unreadable: a line for every row whose image can't be decoded.
        row_errors: a line for every row whose label is no class.
    """

    images: Tensor
    labels: Tensor
    sample_mask: Tensor
    rows: Tensor
    unreadable: list[str]
    row_errors: list[str]

    @property
    def passing(self) -> slice:
        """Which images pass the network in training: all."""
        return slice(None)

    def masked_out(self) -> "Batch":
        """Return the same images, none of which counts."""
        return self._replace(sample_mask=torch.zeros_like(self.sample_mask), unreadable=[], row_errors=[])

    def move_to(self, device: torch.device, layout: torch.memory_format) -> "Batch":
        """Return the same batch on a device, with its images in a memory layout."""
        moved: Batch = send_to_device(self, device, non_blocking=True)
        return moved._replace(images=moved.images.contiguous(memory_format=layout))


class Unreadable(NamedTuple):
    """Stand for a row whose image can't be decoded; ``where`` names the row and the reason."""

    where: str


class Images(Dataset[Any]):
    """Decode and transform the rows of a split; workers of a loader call it.

    An item is (image, label, key), an :class:`Unreadable`, or a text that names a row whose label is no class.

    Args:
        split: from :func:`dg_timm.training.data.sources.load_splits`.
        transform: maps a PIL image to a (channels, height, width) tensor, as ``timm.data.create_transform`` does; or
            one for each epoch.
        label_names: one name for each class. Labels that have names are looked up by name, not by number.
        channels: 1, 3 or 4.
        seed: of the augmentation; None if ``transform`` is not random.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable[[Any], Tensor] | SizeSchedule,
        label_names: Sequence[str],
        *,
        channels: int = 3,
        seed: int | None = None,
    ) -> None:
        self.split, self.transform, self.seed = split, transform, seed
        self.encode = Encoder(split.form, split.classes, label_names)
        self.mode = _MODES[channels]

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Target, SampleKey] | Unreadable | str:
        example = self.split.rows[key.row] if key.example is None else key.example
        value = example["image"]
        try:
            label = self.encode(example["label"])
        except ValueError as error:
            return f"{self._name(key, value)} {error}"
        try:
            image = decode_image(value, self.mode)
        except Exception as error:  # decoders raise anything
            return Unreadable(f"{self._name(key, value)}: {describe(error)}")
        transform = self.transform.at(key.epoch) if isinstance(self.transform, SizeSchedule) else self.transform
        if self.seed is None:
            return transform(image), label, key
        with seeded(self.seed, key.epoch, key.shard, key.row, key.copy):
            return transform(image), label, key

    def _name(self, key: SampleKey, value: Any) -> str:
        return self.split.name_row(key.row, value, None if key.example is None else key.shard)


class Collate:
    """Put rows together in a :class:`Batch` that is filled up to a fixed size.

    Shapes then stay the same for a compiler, and an image's logits don't depend on how full its batch is.

    Args:
        batch_size: number of images in every batch.
        image_size: (channels, height, width).
        classes: number of them, where a row has a number for each; None where it has the number of one.
    """

    def __init__(self, batch_size: int, image_size: tuple[int, int, int], classes: int | None = None) -> None:
        self.batch_size, self.image_size = batch_size, image_size
        self.no_label: Target = 0 if classes is None else np.zeros(classes, dtype=np.float32)

    def __call__(self, rows: list[Any]) -> Batch:
        """Batch the items of :class:`Images`; without a readable row, no image of the batch counts."""
        good = [row for row in rows if type(row) is tuple]
        shown = [good[k % len(good)] for k in range(self.batch_size)] if good else []
        mask = torch.zeros(self.batch_size)
        mask[: len(good)] = 1.0
        return Batch(
            torch.stack([row[0] for row in shown]) if good else torch.zeros(self.batch_size, *self.image_size),
            torch.from_numpy(np.stack([row[1] for row in shown] or [self.no_label] * self.batch_size)),
            mask,
            torch.tensor([[row[2].shard, row[2].row] for row in shown] or [[-1, -1]] * self.batch_size),
            [row.where for row in rows if isinstance(row, Unreadable)],
            [row for row in rows if isinstance(row, str)],
        )
