"""Pictures on disk: which files there are, and what a network makes of them."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dg_timm._errors import BadValue
from dg_timm.training.data.decoding import decode_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Bad(NamedTuple):
    """Stand for a picture that can't be read."""

    file: str
    reason: str


class PictureBatch(NamedTuple):
    """The readable pictures of a batch, (batch, channels, height, width), with their files; and the others."""

    files: list[str]
    images: Tensor | None
    bad: list[Bad]


def find_pictures(places: Sequence[str]) -> list[str]:
    """List files as they are given, and those of folders and their folders by name.

    Raises:
        BadValue: for a place that does not exist, or a folder without a picture.
    """
    found: list[str] = []
    for place in places:
        if not Path(place).exists():
            raise BadValue(f"there is no file or folder {place}")
        files = list(_walk(place)) if Path(place).is_dir() else [place]
        if not files:
            raise BadValue(f"the folder {place} holds no picture ({', '.join(s.lstrip('.') for s in SUFFIXES)})")
        found += files
    return found


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def read_picture(file: str, channels: int) -> Image.Image:
    """Decode a picture, turned as its EXIF data say, with the channels that a network takes."""
    return decode_image(file, _MODES[channels])


class Pictures(Dataset[Any]):
    """Decode and transform files; workers of a loader call it.

    An item is (file, tensor), or a :class:`Bad` for whatever a decoder raises.

    Args:
        files: paths.
        transform: maps a PIL image to a tensor, as ``timm.data.create_transform`` does.
        channels: 1, 3 or 4.
    """

    def __init__(self, files: Sequence[str], transform: Callable[[Any], Tensor], channels: int) -> None:
        self.files, self.transform, self.channels = files, transform, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Tensor] | Bad:
        file = self.files[index]
        try:
            picture = read_picture(file, self.channels)
        except Exception as error:  # decoders raise what they like
            return Bad(file, str(error) or type(error).__name__)
        return file, self.transform(picture)


def collate_pictures(items: list[Any]) -> PictureBatch:
    """Put the readable items of :class:`Pictures` together."""
    good = [item for item in items if not isinstance(item, Bad)]
    images = torch.stack([image for _, image in good]) if good else None
    return PictureBatch([file for file, _ in good], images, [item for item in items if isinstance(item, Bad)])
