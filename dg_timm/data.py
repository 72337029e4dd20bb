"""Labelled images for the training scripts: the embedded digits, a folder, or a data set of the Hugging Face Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_EXTRA = "the data sets need Hugging Face datasets and scikit-learn: pip install 'dg-timm[train]'"


class Splits(NamedTuple):
    """Hugging Face data sets with an ``image`` (PIL) and a ``label`` (int) column."""

    train: Any
    test: Any
    label_names: list[str]


class TransformedImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """(image tensor, label) pairs of one split.

    Args:
        rows: a split of :class:`Splits`.
        transform: RGB PIL image -> tensor, for instance from ``timm.data.create_transform``.
    """

    def __init__(self, rows: Any, transform: Callable[[Any], Tensor]) -> None:
        self.rows = rows
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return self.transform(row["image"].convert("RGB")), row["label"]


def load_splits(source: str, *, test_fraction: float = 0.2, seed: int = 0) -> Splits:
    """Load a classification data set.

    Args:
        source: ``digits`` (scikit-learn's 1,797 handwritten digits, 8 x 8), the path of a folder (of images, a folder
            for each class, optionally below train/ and test/; or of Parquet files), or the name of one on the Hub.
        test_fraction: share of every class that is set aside where the source has no test or validation split.
        seed: of that choice.

    Raises:
        FileNotFoundError: for a path that is not a folder.
        ValueError: if the source has no image or label column, or a class too small to split.
        ImportError: if the extra is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    looks_like_path = source.startswith((".", "/", "~")) or Path(source).exists()
    if source == "digits":
        splits = datasets.DatasetDict({"train": _digits()})
    elif looks_like_path:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"{source} is not a folder; give one with a folder of images for each class")
        splits = datasets.load_dataset(str(folder))
    else:
        splits = datasets.load_dataset(source)

    train = splits["train"] if "train" in splits else splits[next(iter(splits))]
    image = _column(train, datasets.Image, "image", source)
    label = _column(train, datasets.ClassLabel, "label", source)
    held_out = next((splits[name] for name in ("test", "validation") if name in splits), None)
    if held_out is None:
        smallest = min(np.unique(train[label], return_counts=True)[1])
        if smallest < 2:
            raise ValueError(
                f"{source} has no test split, and a class of a single image can't be split; add images to it"
            )
        halves = train.train_test_split(test_fraction, stratify_by_column=label, seed=seed)
        train, held_out = halves["train"], halves["test"]
    keep = {image: "image", label: "label"}
    renamed = {old: new for old, new in keep.items() if old != new}
    parts = [part.select_columns(list(keep)).rename_columns(renamed) for part in (train, held_out)]
    return Splits(parts[0], parts[1], list(parts[0].features["label"].names))


def _column(rows: Any, kind: type, preferred: str, source: str) -> str:
    found = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if not found:
        raise ValueError(f"{source} has no {preferred} column ({kind.__name__}); its columns are {dict(rows.features)}")
    return preferred if preferred in found else found[0]


def _digits() -> Any:
    try:
        import datasets
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    from PIL import Image

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0..16
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    rows = {"image": [Image.fromarray(image) for image in grey], "label": digits.target.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)
