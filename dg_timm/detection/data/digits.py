"""Pages of handwritten digits: a small detection data set, made from the digits that come with scikit-learn."""

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image as Pillow

PAGE_SIZE = (96, 128)  # height and width in pixels
NUM_PAGES = {"train": 240, "validation": 60}
_MOST_DIGITS = 6
_DIGIT_SIDES = (16, 32)  # pixels, smallest and largest


def digit_pages(seed: int = 0) -> dict[str, Dataset]:
    """Make pages of 1 to 6 digits, 16 to 32 px large, none over another; the same pages for the same seed.

    The two splits share no digit. Boxes are [left, top, width, height] of the digit's square, in pixels.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    held_out = -(-len(images) // 5)
    numbers = np.arange(len(images))
    shares = {"train": numbers[:-held_out], "validation": numbers[-held_out:]}
    one = {"bbox": List(Value("float32"), length=4), "category": ClassLabel(names=list(map(str, range(10))))}
    features = Features({"image_id": Value("int64"), "image": datasets.Image(), "objects": List(one)})
    parts = {}
    for split, count in NUM_PAGES.items():
        random = np.random.default_rng([seed, len(split)])
        rows: dict[str, list[object]] = {"image_id": [], "image": [], "objects": []}
        for page in range(count):
            canvas, objects = _page(random, images, digits.target, shares[split])
            rows["image_id"].append(page)
            rows["image"].append(Pillow.fromarray(canvas))
            rows["objects"].append(objects)
        parts[split] = Dataset.from_dict(rows, features=features)
    return parts


def _page(
    random: np.random.Generator, images: np.ndarray, target: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, list[dict[str, object]]]:
    height, width = PAGE_SIZE
    canvas = random.integers(0, 40, PAGE_SIZE).astype(np.uint8)
    taken = np.zeros(PAGE_SIZE, dtype=bool)
    objects: list[dict[str, object]] = []
    for _ in range(random.integers(2, _MOST_DIGITS + 1)):
        number, side = int(random.choice(share)), int(random.integers(_DIGIT_SIDES[0], _DIGIT_SIDES[1] + 1))
        top, left = int(random.integers(0, height - side)), int(random.integers(0, width - side))
        place = (slice(top, top + side), slice(left, left + side))
        if taken[place].any():
            continue
        taken[place] = True
        drawn = np.asarray(Pillow.fromarray(images[number]).resize((side, side), Pillow.Resampling.BILINEAR))
        canvas[place] = np.maximum(canvas[place], drawn)
        objects.append({"bbox": [left, top, side, side], "category": int(target[number])})
    return canvas, objects
