"""What a data set holds, in a line and in a picture, before anything is trained on it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from dg_timm._errors import BadValue
from dg_timm._files import atomic_path
from dg_timm.training.data.decoding import decode_image
from dg_timm.training.data.label_forms import Encoder
from dg_timm.training.data.splits import Split, Splits

_CLASSES_SHOWN = 8
SAMPLES, _COLUMNS, _TILE, _CAPTION = 16, 4, 160, 28


def describe_data(splits: Splits, source: str) -> str:
    """Write one line: the source, the rows of each split, the classes, and what was left out."""
    train = "" if splits.train.size == 0 else f"{_rows(splits.train)} to train on, "
    rows = f"{train}{_rows(splits.test)} to evaluate on ({splits.test.name})"
    return describe_parts(source, rows, splits.label_names, splits.left_out, splits.remarks)


def describe_parts(
    source: str, rows: str, label_names: Sequence[str], left_out: Sequence[str], remarks: Sequence[str] = ()
) -> str:
    """Join the parts of the line about a data set, whatever its task."""
    shown = ", ".join(label_names[:_CLASSES_SHOWN]) + (", ..." if len(label_names) > _CLASSES_SHOWN else "")
    without = f"; left out: {'; '.join(left_out)}" if left_out else ""
    said = "".join(f"; {remark}" for remark in remarks)
    return f"data {source}: {rows}; {len(label_names)} classes ({shown}){without}{said}"


def _rows(split: Split) -> str:
    return "a stream of images" if split.size is None else f"{split.size} images"


def draw_samples(split: Split, label_names: list[str], file: Path) -> int:
    """Save a picture of at most 16 samples from all over a split, each with the name of its class; count them.

    Raises:
        BadValue: the picture can't be written.
    """
    samples, encode = _samples(split), Encoder(split.form, split.classes, label_names)
    tiles = [
        (partial(decode_image, example["image"], "RGB"), _caption(encode, label_names, example["label"]))
        for example in samples
    ]
    draw_sheet(tiles, file)
    return len(samples)


def draw_sheet(tiles: Sequence[tuple[Callable[[], Image.Image], str]], file: Path) -> None:
    """Save a picture of samples.

    Args:
        tiles: for each sample what decodes it, and its caption.
        file: the picture.

    Raises:
        BadValue: the picture can't be written.
    """
    rows = -(-len(tiles) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _TILE, rows * (_TILE + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (decode, caption) in enumerate(tiles):
        x, y = k % _COLUMNS * _TILE, k // _COLUMNS * (_TILE + _CAPTION)
        try:
            image = decode()
        except Exception:  # decoders raise anything
            draw.text((x + 4, y + 4), "can't be read", "red")
        else:
            enlarged = ImageOps.contain(image, (_TILE - 4, _TILE - 4), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x + 2, y + 2))
        draw.text((x + 4, y + _TILE + 2), _drawable(caption), "black")
    try:
        with atomic_path(file) as temporary:
            sheet.save(temporary)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        raise BadValue(f"the picture {file} can't be written: {error}") from error


def sample_places(size: int) -> list[int]:
    """The rows of a split of ``size`` that its picture shows: at most 16, from all over."""
    return [int(k) for k in np.unique(np.linspace(0, size - 1, SAMPLES).astype(int))]


def _caption(encode: Encoder, label_names: list[str], label: Any) -> str:
    """Name the class of a sample, or the classes, the likeliest first."""
    try:
        target = encode(label)
    except ValueError:
        return str(label)
    if isinstance(target, int):
        return label_names[target]
    return ", ".join(label_names[k] for k in np.argsort(-target, kind="stable") if target[k]) or "no class"


def _samples(split: Split) -> list[dict[str, Any]]:
    if split.streamed:
        return list(split.rows.take(SAMPLES))
    return [split.rows[k] for k in sample_places(len(split.rows))]


def _drawable(text: str) -> str:
    """Replace what a font without Unicode can't draw."""
    short = text if len(text) <= 24 else text[:23] + "~"
    return short.encode("ascii", "replace").decode("ascii")
