"""One image: whatever its file says of itself, it is read right, or named."""

import io
import struct
import warnings

import datasets
import numpy as np
import pytest
from PIL import Image

from dg_timm._errors import BadValue
from dg_timm.training.data.decoding import decode_image
from dg_timm.training.data.images import Collate, Images, Unreadable
from dg_timm.training.data.loader import Loader
from dg_timm.training.data.samplers import MapSampler, SampleKey
from dg_timm.training.data.sources import load_splits
from dg_timm.training.data.splits import Split
from tests.helpers.files import png


def encoded(image, file_format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return {"bytes": stream.getvalue(), "path": None}


def with_exif(*tags):
    """A JPEG of 16 x 8 pixels whose EXIF block holds these (tag, type, count, packed value)."""
    plain = encoded(Image.new("RGB", (16, 8)), "JPEG")["bytes"]
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3].ljust(4, b"\0") for tag in tags)
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return {"bytes": plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:], "path": None}


ODD_WIDTH = (256, 11, 1, struct.pack("<f", 16.0))
TURNED = (274, 3, 1, struct.pack("<H", 6))


@pytest.mark.parametrize(
    ("tags", "size"),
    [
        ([], (16, 8)),
        ([TURNED], (8, 16)),
        ([ODD_WIDTH, TURNED], (8, 16)),  # Pillow can't write such a tag back
        ([(274, 3, 1, struct.pack("<H", 77))], (16, 8)),
        ([(274, 2, 4, b"6\0\0\0")], (16, 8)),
        ([(274, 3, 99, b"\xff\xff\xff\x7f")], (16, 8)),  # its values lie outside the file
    ],
)
def test_a_sound_file_with_any_exif_is_read(tags, size):
    value = with_exif(*tags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of corrupt EXIF data
        assert decode_image(value, "RGB").size == size
        assert decode_image(value, "RGB", turn=False).size == (16, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation):
    from PIL import ImageOps

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    value = encoded(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(value["bytes"])))
    assert np.array_equal(decode_image(value, "RGB"), expected)


@pytest.mark.parametrize(("file_format", "kind"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")])
def test_gray_images_of_16_bits_are_scaled(file_format, kind):
    values = np.array([[0, 257, 32896, 65535]], kind)
    for mode in ("RGB", "L", "RGBA"):
        gray = np.asarray(decode_image(encoded(Image.fromarray(values), file_format), mode))
        assert (gray if mode == "L" else gray[..., 0]).tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize(("kind", "name"), [(np.int32, "32-bit integers"), (np.float32, "floats")])
def test_pixels_without_a_known_range_are_named(kind, name):
    value = encoded(Image.fromarray(np.full((2, 2), 300, kind)), "TIFF")
    with pytest.raises(ValueError, match=f"its pixels are {name}, whose range is not known"):
        decode_image(value, "RGB")


class Raising:
    """Stands for a decoder with a fault of its own."""

    def __init__(self, error):
        self.error = error

    def get(self, key):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [struct.error("unpack"), IndexError("x"), KeyError("y"), RuntimeError("z"), MemoryError(), ZeroDivisionError("d")],
)
def test_whatever_a_decoder_raises_names_the_row(error):
    split = Split([{"image": Raising(error), "label": 0}], "the split", 1)
    found = Images(split, lambda image: image, ["a"])[SampleKey(0, 0, 0)]
    assert isinstance(found, Unreadable)
    assert found.where.startswith("row 0 of the split")
    assert type(error).__name__ in found.where


def test_a_row_without_an_image_is_named():
    split = Split([{"image": None, "label": 0}], "the split", 1)
    assert "there is no image" in Images(split, lambda image: image, ["a"])[SampleKey(0, 0, 0)].where


def parquet(folder, labels, kind="int64"):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    images = [{"bytes": png(k), "path": None} for k in range(len(labels))]
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    table.to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, 1] * 9 + [None, 1], "int64", "row 18 of .* has no label"),
        ([0, 1] * 9 + [-1, -1], "int64", r"label -1 at row 18 of .* is outside 0..1; 1 more rows are of no class"),
        (["a", "b"] * 9 + [None, " "], "string", "row 18 of .* has no label; 1 more rows are of no class"),
        ([None, 0] + [0, 1] * 9, "int64", "row 0 of .* has no label"),
    ],
)
def test_a_missing_label_is_one_bad_row(tmp_path, labels, kind, message):
    file = parquet(tmp_path, labels, kind)
    with pytest.raises(BadValue, match=rf"{message}.*--on-bad-image skip leaves them out"):
        load_splits(file)
    splits = load_splits(file, skip_bad_rows=True)
    bad = sum(label in (None, -1, " ") for label in labels)
    assert splits.train.size + splits.test.size == 20 - bad
    assert len(splits.label_names) == 2
    assert splits.left_out == (f"{bad} rows of the training split of {file} whose label is no class",)


def test_a_split_without_any_label_is_refused(tmp_path):
    with pytest.raises(BadValue, match=r"row 0 of .* has no label; 3 more rows"):
        load_splits(parquet(tmp_path, [None] * 4), skip_bad_rows=True)


def test_numbers_in_text_are_in_the_order_of_numbers(tmp_path):
    file = parquet(tmp_path, [str(k) for k in range(12)] * 2, "string")
    assert load_splits(file).label_names == [str(k) for k in range(12)]


def test_a_bad_label_of_a_stream_is_skipped_on_request(tmp_path):
    file = parquet(tmp_path, [0, 1, None, 7])
    split = load_splits(file, val_source="digits", streaming=True, label_names=[str(k) for k in range(10)]).train
    assert split.streamed
    rows = [{"image": row["image"], "label": row["label"]} for row in split.rows]
    plain = Split(rows, "the split", 4)
    lines = []
    images = Images(plain, lambda image: __import__("torch").zeros(3, 8, 8), ["0", "1"])
    loader = Loader(MapSampler(4, 4), images, Collate(4, (3, 8, 8)), on_bad_image="skip", report=lines.append)
    (batch,) = loader.epoch(0)
    assert batch.sample_mask.sum() == 2
    assert loader.skipped == 2
    assert [line.split(" has the label ")[1] for line in lines] == ["None, outside 0..1", "7, outside 0..1"]


def test_class_labels_of_two_files_are_matched_by_name(tmp_path):
    """The same number stands for another class in each file."""
    for split, names in (("train", ["ant", "bee", "cow"]), ("test", ["cow", "ant"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": png(0), "path": None}] * 4, "label": [0, 1] * 2}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_splits(str(tmp_path))
    images = Images(splits.test, lambda image: image, splits.label_names)
    assert [images[SampleKey(0, 0, k)][1] for k in range(4)] == [2, 0, 2, 0]
