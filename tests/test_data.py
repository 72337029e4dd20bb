"""Data sets of the training scripts, on real files."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dg_timm.data import TransformedImages, load_splits


@pytest.fixture
def folder(tmp_path):
    """Real digits of two classes as a folder of PNG files."""
    digits = load_digits()
    for name, label in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        for k, image in enumerate(digits.images[digits.target == label][:10]):
            Image.fromarray((image * 15).astype(np.uint8)).save(tmp_path / name / f"{k}.png")
    return tmp_path


def test_digits_are_scikit_learns():
    splits = load_splits("digits")
    assert (len(splits.train), len(splits.test)) == (1437, 360)
    assert splits.label_names == [str(k) for k in range(10)]
    digits = load_digits()
    expected = {
        (round(float(image.sum() * 255 / 16), -2), int(t))
        for image, t in zip(digits.images, digits.target, strict=True)
    }
    for row in splits.test.select(range(20)):
        grey = np.asarray(row["image"])
        assert grey.shape == (8, 8)
        assert grey.max() == 255
        assert any(abs(total - grey.sum()) < 150 and label == row["label"] for total, label in expected)
    counts = np.bincount(splits.test["label"])
    assert counts.max() - counts.min() <= 2  # stratified
    assert splits.test["label"] == load_splits("digits").test["label"]  # and the same every time


def test_an_image_folder_is_split_by_class(folder):
    splits = load_splits(str(folder))
    assert splits.label_names == ["one", "two"]
    assert np.bincount(splits.test["label"]).tolist() == [2, 2]
    images = TransformedImages(splits.train, timm.data.create_transform((3, 16, 16), is_training=True))
    batch, labels = next(iter(torch.utils.data.DataLoader(images, batch_size=16)))
    assert batch.shape == (16, 3, 16, 16)
    assert set(labels.tolist()) == {0, 1}


def test_a_folder_with_a_test_split_keeps_it(folder):
    for split in ("train", "test"):
        (folder / split).mkdir()
    for name in ("one", "two"):
        (folder / "test" / name).mkdir()
        (folder / name / "0.png").rename(folder / "test" / name / "0.png")
        (folder / name).rename(folder / "train" / name)
    splits = load_splits(str(folder))
    assert (len(splits.train), len(splits.test)) == (18, 2)


def test_sources_that_are_not_there(tmp_path, folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="is not a folder; give one with a folder of images for each class"):
        load_splits(str(tmp_path / "nowhere"))
    for image in list((folder / "one").iterdir())[1:]:
        image.unlink()
    with pytest.raises(ValueError, match="a class of a single image can't be split"):
        load_splits(str(folder))


def test_a_saved_parquet_data_set_without_labels_is_refused(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no image column"):
        load_splits(str(tmp_path))
