"""Data sets with a column of objects."""

import shutil

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

from dg_timm._errors import BadValue
from dg_timm.detection.data.annotations import DataOptions, load_detection
from dg_timm.detection.data.boxes import Categories
from dg_timm.detection.data.columns import ColumnTable
from dg_timm.detection.data.loading import read_image
from tests.helpers.detection import make_table


@pytest.mark.parametrize("as_columns", [True, False])
@pytest.mark.parametrize(
    ("box_format", "box"), [("coco", [6, 4, 12, 8]), ("voc", [6, 4, 18, 12]), ("yolo", [0.2, 0.2, 0.2, 0.2])]
)
def test_data_sets_of_the_hub(tmp_path, as_columns, box_format, box):
    for split in ("train", "test"):
        make_table([box], [1], as_columns=as_columns, image_id=[77]).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_detection(str(tmp_path), DataOptions(box_format=box_format))
    (row,) = splits.test.rows
    assert np.allclose(row.boxes, [[6, 4, 18, 12]], atol=1e-5)
    assert (row.labels.tolist(), row.image_id, row.size) == ([2], 77, (40, 60))
    assert splits.categories == Categories(["a", "b"], [0, 1])
    assert read_image(splits.test, 0).size == (60, 40)


@pytest.mark.parametrize(
    ("columns", "error"),
    [(dict(boxes=[[0, 0, 90, 9]], categories=[0]), "object 0 of row 0 has the box .* outside its image of 60 x 40"),
     (dict(boxes=[[0, 0, 9, 9]], categories=[-1], names=None), "object 0 of row 0 .*category -1")],
)  # fmt: skip
def test_bad_rows_of_a_table_are_named(tmp_path, columns, error):
    for split in ("train", "test"):
        make_table(**columns).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(BadValue, match=error):
        load_detection(str(tmp_path))


def test_a_data_set_saved_to_disk(tmp_path):
    splits = {"train": make_table([[0, 0, 9, 9]], [0]), "test": make_table([[1, 1, 9, 9]], [1])}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    assert load_detection(str(tmp_path / "data")).test.rows[0].labels.tolist() == [2]


def test_splits_may_have_different_categories(tmp_path):
    """Without ClassLabel the categories are those that any of the two splits has."""
    make_table([[0, 0, 9, 9], [1, 1, 9, 9]], ["dog", "cat"], names=None).to_parquet(tmp_path / "train.parquet")
    make_table([[0, 0, 9, 9]], ["emu"], names=None).to_parquet(tmp_path / "test.parquet")
    splits = load_detection(str(tmp_path))
    assert splits.categories.names == ["cat", "dog", "emu"]
    assert splits.test.rows[0].labels.tolist() == [3]
    known = Categories(["dog", "emu"], [0, 1])  # of a detector
    assert load_detection(str(tmp_path), known=known).test.rows[0].labels.tolist() == [2]


def test_a_classification_data_set_is_refused(tmp_path):
    make_table([[0, 0, 9, 9]], [0]).remove_columns("objects").to_parquet(tmp_path / "train.parquet")
    shutil.copy(tmp_path / "train.parquet", tmp_path / "test.parquet")
    with pytest.raises(BadValue, match=r"has the columns picture; detection needs .*objects"):
        load_detection(str(tmp_path))


def test_texts_are_categories_too(tmp_path):
    for split in ("train", "test"):
        make_table([[0, 0, 9, 9], [1, 1, 9, 9]], ["dog", "cat"], names=None).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_detection(str(tmp_path))
    assert splits.categories.names == ["cat", "dog"]
    assert splits.train.rows[0].labels.tolist() == [2, 1]


def test_sizes_are_stored_or_read_from_the_images(tmp_path):
    for split in ("train", "test"):
        make_table([[0, 0, 90, 9]], [0], width=[200], height=[100]).to_parquet(tmp_path / f"{split}.parquet")
    assert load_detection(str(tmp_path)).test.rows[0].size == (100, 200)
    broken = make_table([[0, 0, 9, 9]], [0]).cast_column("picture", ImageFeature(decode=False))
    broken = broken.map(lambda row: {"picture": {"bytes": b"no image", "path": None}})
    broken.cast_column("picture", ImageFeature()).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(BadValue, match=r"the image of row 0 of the evaluation split of .* can't be read"):
        load_detection(str(tmp_path))


@pytest.mark.parametrize(
    ("objects", "error"),
    [({"bbx": [[0.0, 0.0, 9.0, 9.0]], "category": [1]}, r"keys bbx, category, but no bbox \(bbx is the nearest\)"),
     ({"bbox": [[0.0, 0.0, 9.0, 9.0]], "kind": [1]}, "but no category"),
     ({"bbox": [[0.0, 0.0, 9.0, 9.0]], "category": [1, 2]}, "row 0 of .* has 1 boxes and 2 categories"),
     ([1, 2], "objects must be a list of dicts or a dict of lists")],
)  # fmt: skip
def test_a_column_of_objects_that_has_no_boxes(tmp_path, objects, error):
    image = Image.fromarray(np.zeros((40, 60, 3), np.uint8))
    for split in ("train", "test"):
        table = Dataset.from_dict({"image": [image], "objects": [objects]})
        table.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(BadValue, match=error):
        load_detection(str(tmp_path))


def test_an_empty_split_is_named():
    with pytest.raises(BadValue, match="the split is empty"):
        ColumnTable(make_table([[0, 0, 9, 9]], [0]).select([]), "the split")


def test_areas_and_crowds_are_those_of_the_table(tmp_path):
    image = Image.fromarray(np.zeros((40, 60, 3), np.uint8))
    objects = {"bbox": [[0.0, 0.0, 9.0, 9.0]] * 2, "category": [0, 1], "area": [50.0, 0.0], "iscrowd": [0, 1]}
    for split in ("train", "test"):
        Dataset.from_dict({"image": [image], "objects": [objects]}).to_parquet(tmp_path / f"{split}.parquet")
    (row,) = load_detection(str(tmp_path)).test.rows
    assert row.area.tolist() == [50, 81]  # an area of 0 is not known
    assert row.crowd.tolist() == [False, True]


def test_crowds_and_areas_may_be_text(tmp_path):
    image = Image.fromarray(np.zeros((40, 60, 3), np.uint8))
    objects = {"bbox": [[0.0, 0.0, 9.0, 9.0]] * 2, "category": [0, 1], "area": ["50", ""], "iscrowd": ["0", "1"]}
    for split in ("train", "test"):
        Dataset.from_dict({"image": [image], "objects": [objects]}).to_parquet(tmp_path / f"{split}.parquet")
    (row,) = load_detection(str(tmp_path)).test.rows
    assert row.area.tolist() == [50, 81]
    assert row.crowd.tolist() == [False, True]


def test_class_labels_are_matched_by_name(tmp_path):
    make_table([[0, 0, 9, 9]], [0], names=("a", "b", "c")).to_parquet(tmp_path / "train.parquet")
    make_table([[0, 0, 9, 9]], [0], names=("c", "a")).to_parquet(tmp_path / "test.parquet")
    splits = load_detection(str(tmp_path))
    assert splits.categories.names == ["a", "b", "c"]
    assert splits.test.rows[0].labels.tolist() == [3]


def test_one_split_is_not_learned_and_evaluated(tmp_path):
    make_table([[0, 0, 9, 9]], [0]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(BadValue, match=r"the rows to train on and to evaluate on are the same.*--val-data"):
        load_detection(str(tmp_path), DataOptions(val_split="train"))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BadValue, match=r"no such folder: .*nowhere; give a folder with images and COCO annotation"):
        load_detection(str(tmp_path / "nowhere"))
