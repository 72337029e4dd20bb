"""Image files as users have them, of scikit-learn's handwritten digits."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DIGITS = load_digits()


def png(k: int) -> bytes:
    """Digit ``k`` as a PNG file, 8 x 8 gray pixels."""
    stream = io.BytesIO()
    Image.fromarray((DIGITS.images[k] * 15).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def image_folder(folder: Path, images: int, *, damaged: int = 0) -> Path:
    """A folder of ones and twos, with a folder for each class; the first ``damaged`` twos are cut short."""
    for name, label in (("one", 1), ("two", 2)):
        (folder / name).mkdir(parents=True)
        for n, k in enumerate(np.flatnonzero(DIGITS.target == label)[:images]):
            cut = 50 if label == 2 and n < damaged else None
            (folder / name / f"{n}.png").write_bytes(png(k)[:cut])
    return folder


def shards(folder: Path, count: int = 3, rows: int = 5, label: int | None = None) -> Path:
    """Webdataset shards of digits: ``count`` tar files of ``rows`` images; ``label`` replaces their own."""
    folder.mkdir(parents=True)
    for shard in range(count):
        with tarfile.open(folder / f"train-{shard:03}.tar", "w") as tar:
            for k in range(shard * rows, (shard + 1) * rows):
                text = str(DIGITS.target[k] if label is None else label)
                for suffix, data in (("png", png(k)), ("cls", text.encode())):
                    info = tarfile.TarInfo(f"{k:05}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder
