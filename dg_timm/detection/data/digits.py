"""Pages of handwritten digits: a detection data set that comes with scikit-learn, to try things on."""

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image as Pillow

SIZE = (96, 128)  # height and width of a page, pixels
PAGES = {"train": 240, "validation": 60}


def digit_pages(seed: int = 0) -> dict[str, Dataset]:
    """Pages with 1 to 6 of scikit-learn's digits, 16 to 32 px large, none over another; always the same ones.

    The digits of the two splits are different ones. Boxes are [left, top, width, height] of the digit's square.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    shares = {"train": np.arange(len(grey))[: -len(grey) // 5], "validation": np.arange(len(grey))[-len(grey) // 5 :]}
    one = {"bbox": List(Value("float32"), length=4), "category": ClassLabel(names=list(map(str, range(10))))}
    features = Features({"image_id": Value("int64"), "image": datasets.Image(), "objects": List(one)})
    parts = {}
    for split, count in PAGES.items():
        random = np.random.default_rng([seed, len(split)])
        rows: dict[str, list[object]] = {"image_id": [], "image": [], "objects": []}
        for page in range(count):
            canvas, objects = _page(random, grey, digits.target, shares[split])
            rows["image_id"].append(page)
            rows["image"].append(Pillow.fromarray(canvas))
            rows["objects"].append(objects)
        parts[split] = Dataset.from_dict(rows, features=features)
    return parts


def _page(
    random: np.random.Generator, grey: np.ndarray, target: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, list[dict[str, object]]]:
    height, width = SIZE
    canvas = random.integers(0, 40, SIZE).astype(np.uint8)
    taken = np.zeros(SIZE, dtype=bool)
    objects: list[dict[str, object]] = []
    for _ in range(random.integers(2, 7)):
        number, side = int(random.choice(share)), int(random.integers(16, 33))
        top, left = int(random.integers(0, height - side)), int(random.integers(0, width - side))
        place = (slice(top, top + side), slice(left, left + side))
        if taken[place].any():
            continue
        taken[place] = True
        drawn = np.asarray(Pillow.fromarray(grey[number]).resize((side, side), Pillow.Resampling.BILINEAR))
        canvas[place] = np.maximum(canvas[place], drawn)
        objects.append({"bbox": [left, top, side, side], "category": int(target[number])})
    return canvas, objects
