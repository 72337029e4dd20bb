"""Images whose size changes over a training: small ones first cost less, and the last ones are what counts."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dg_timm._errors import BadValue

Transform = Callable[[Any], Tensor]


class SizeSchedule:
    """A transform for each part of a training. An epoch has one size, so that a resume needs to know nothing more.

    Args:
        sizes: height and width of the images in pixels, one after the other.
        epochs: of the training, which are divided among the sizes as evenly as they can be.
        make: size -> transform.

    Raises:
        BadValue: there are fewer epochs than sizes.
    """

    def __init__(self, sizes: Sequence[int], epochs: int, make: Callable[[int], Transform]) -> None:
        if len(sizes) > epochs:
            raise BadValue(f"--size-schedule has {len(sizes)} sizes for {epochs} epochs; an epoch has one size")
        self.sizes, self.epochs = list(sizes), epochs
        self.transforms = [make(size) for size in sizes]

    def part(self, epoch: int) -> int:
        """Return the place of an epoch's size, counted from 0; after the last epoch it stays."""
        return min(epoch * len(self.sizes) // self.epochs, len(self.sizes) - 1)

    def at(self, epoch: int) -> Transform:
        """Return the transform of an epoch, counted from 0."""
        return self.transforms[self.part(epoch)]

    def describe(self) -> str:
        """Say from which epoch on images have which size; epochs count from 1."""
        first = [next(epoch for epoch in range(self.epochs) if self.part(epoch) == k) for k in range(len(self.sizes))]
        parts = [f"{size} from epoch {epoch + 1}" for size, epoch in zip(self.sizes, first, strict=True)]
        return f"training images by {', '.join(parts)}, in pixels"
