"""Decode one image, whatever its file says of itself: odd EXIF tags, 16 bits, a path or bytes."""

import io
from typing import Any

import fsspec
import numpy as np
from PIL import Image

_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_16_BITS_AS_32 = ("PNG", "PPM")  # formats whose 16-bit grays some releases of Pillow open as 32-bit integers


def decode_image(value: Any, mode: str, *, turn: bool = True) -> Image.Image:
    """Decode an image that a data set holds.

    Args:
        value: ``{"bytes", "path"}``, as an undecoded column of ``datasets`` has it, or a path.
        mode: Pillow's name of the channels, e.g. ``RGB``.
        turn: turn the image as its EXIF orientation says.

    Raises:
        ValueError: there is no image, or its pixels have no known range. Decoders raise other errors as well.
    """
    with _open(value) as image:
        image.load()
        turned = image.transpose(_TURNS[orientation]) if turn and (orientation := _orientation(image)) else image
        return to_mode(turned, mode, image.format)


def _open(value: Any) -> Image.Image:
    source = value if isinstance(value, str) else (value or {}).get("bytes")
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    path = source or (value or {}).get("path")
    if path is None:
        raise ValueError("there is no image")
    if "://" not in path:
        return Image.open(path)
    with fsspec.open(path, "rb") as stream:
        return Image.open(io.BytesIO(stream.read()))


def _orientation(image: Image.Image) -> int | None:
    """Read the EXIF orientation; what can't be read turns nothing."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # a sound image may have any EXIF, and readers of EXIF raise anything
        return None
    return found if isinstance(found, int) and found in _TURNS else None


def to_mode(image: Image.Image, mode: str, file_format: str | None = None) -> Image.Image:
    """Convert an image to ``mode``; 16 bits are scaled to 8, where Pillow would make nearly all of them white.

    Raises:
        ValueError: 32-bit integers or floats, whose range no file tells.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in _16_BITS_AS_32):
        scaled = np.rint(np.asarray(image, dtype=np.float32) / 257)
        image = Image.fromarray(scaled.astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(f"its pixels are {kind}, whose range is not known; save it with 8 or 16 bits")
    return image.convert(mode)


def describe(error: Exception) -> str:
    """Say what a decoder raised, with the kind of error where its text alone says little."""
    text = str(error)
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__} {text}".strip()
