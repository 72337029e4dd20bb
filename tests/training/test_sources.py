"""Data sets as users have them: real files in every format."""

import datasets
import numpy as np
import pytest

from dg_timm._errors import BadValue
from dg_timm.training.data.sources import load_splits
from dg_timm.training.data.splits import count_rows
from tests.helpers.files import DIGITS, png, shards


@pytest.fixture
def folder(tmp_path):
    """Real digits of two classes as a folder of PNG files."""
    for name, label in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        for k, index in enumerate(np.flatnonzero(DIGITS.target == label)[:10]):
            (tmp_path / name / f"{k}.png").write_bytes(png(index))
    return tmp_path


def test_digits_are_scikit_learns():
    splits = load_splits("digits")
    assert (splits.train.size, splits.test.size) == (1437, 360)
    assert splits.label_names == [str(k) for k in range(10)]
    expected = {
        (round(float(image.sum() * 255 / 16), -2), int(t))
        for image, t in zip(DIGITS.images, DIGITS.target, strict=True)
    }
    for row in splits.test.rows.select(range(20)):
        gray = np.asarray(datasets.Image().decode_example(row["image"]))
        assert gray.shape == (8, 8)
        assert gray.max() == 255
        assert any(abs(total - gray.sum()) < 150 and label == row["label"] for total, label in expected)
    labels = splits.test.rows["label"]
    counts = np.bincount(labels)
    assert counts.max() - counts.min() <= 2  # stratified
    assert list(labels) == list(load_splits("digits").test.rows["label"])  # and the same every time


def test_an_image_folder_is_split_by_class(folder):
    splits = load_splits(str(folder))
    assert splits.label_names == ["one", "two"]
    assert np.bincount(splits.test.rows["label"]).tolist() == [2, 2]
    assert set(splits.train.rows[0]["image"]) == {"bytes", "path"}  # undecoded: that is left to workers


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_split_is_preferred_to_a_test_split(folder, streaming):
    for split, size in (("train", 5), ("validation", 3), ("test", 2)):
        for name in ("one", "two"):
            (folder / split / name).mkdir(parents=True)
            for image in sorted((folder / name).iterdir())[:size]:
                image.rename(folder / split / name / image.name)
    for name in ("one", "two"):
        (folder / name).rmdir()
    splits = load_splits(str(folder), streaming=streaming)
    assert [count_rows(split) for split in (splits.train, splits.test)] == [10, 6]
    assert splits.train.streamed == streaming
    assert count_rows(load_splits(str(folder), val_split="test", streaming=streaming).test) == 4
    with pytest.raises(BadValue, match=r"--val-split tset: .* has no such split; it has train, validation, test"):
        load_splits(str(folder), val_split="tset", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_data_sets_and_parquet(tmp_path, streaming):
    rows = load_splits("digits").train.rows.select(range(12))
    datasets.DatasetDict(train=rows, test=rows.select(range(4))).save_to_disk(tmp_path / "saved")
    rows.save_to_disk(tmp_path / "one")
    rows.to_parquet(tmp_path / "rows.parquet", batch_size=5)
    for source, val in (("saved", None), ("one", "saved"), ("rows.parquet", "one")):
        val_source = str(tmp_path / val) if val else None
        splits = load_splits(str(tmp_path / source), val_source=val_source, streaming=streaming)
        assert count_rows(splits.train) == 12
        assert [row["label"] for row in splits.train.rows] == list(rows["label"])
    assert splits.label_names == [str(k) for k in range(10)]
    if streaming:
        assert splits.train.rows.num_shards == 3  # Parquet: a shard for each row group
    stored = [row["image"]["bytes"] for row in rows]
    assert [row["image"]["bytes"] for row in splits.train.rows] == stored  # neither decoded nor encoded again


def test_names_of_the_user_come_before_those_of_the_data():
    names = [f"digit {k}" for k in range(10)]
    assert load_splits("digits", label_names=names).label_names == names
    with pytest.raises(BadValue, match="9 label names for the 10 classes of digits"):
        load_splits("digits", label_names=names[:9])


def test_rows_keep_their_numbers():
    splits = load_splits("digits")
    whole = datasets.Dataset.from_dict({"label": DIGITS.target})
    for split in (splits.train, splits.test, splits.test.select([3, 8])):
        assert [whole[split.source_row(k)]["label"] for k in range(2)] == [split.rows[k]["label"] for k in range(2)]
    assert splits.test.name == "20 % of digits, set aside"


def test_webdataset_shards_need_names_when_streamed(tmp_path):
    train, val = shards(tmp_path / "train"), shards(tmp_path / "val", count=1)
    with pytest.raises(
        BadValue, match=r"does not tell the classes of a stream; give --label-names .* or --num-classes"
    ):
        load_splits(str(train), val_source=str(val), streaming=True)
    names = [f"digit {k}" for k in range(10)]
    splits = load_splits(str(train), val_source=str(val), streaming=True, label_names=names)
    assert splits.label_names == names
    assert splits.train.rows.num_shards == 3
    assert [row["image"]["bytes"] for row in splits.train.rows] == [
        png(k) for k in range(15)
    ]  # as they are in the file
    assert [row["label"] for row in splits.train.rows] == DIGITS.target[:15].tolist()
    assert load_splits(str(train), val_source=str(val)).label_names == [str(k) for k in range(10)]  # read and counted


def test_text_labels(tmp_path):
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("string")})
    table = {"photo": [{"bytes": png(k), "path": None} for k in range(8)], "kind": ["cat", "ant"] * 4}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    splits = load_splits(str(tmp_path), label_key="kind")
    assert splits.label_names == ["ant", "cat"]
    with pytest.raises(BadValue, match=r"no label column; name one with --label-key. Its columns are photo .*, kind"):
        load_splits(str(tmp_path))
    with pytest.raises(BadValue, match=r"--image-key img: .* has no such column; its columns are photo \(Image.*kind"):
        load_splits(str(tmp_path), image_key="img")


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_outside_the_range_is_named(tmp_path, label):
    rows = load_splits("digits").train.rows.select(range(6))
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    table = {"image": rows["image"], "label": [1, 2, 3, label, 4, label]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path)
    with pytest.raises(BadValue, match=rf"label {label} at row 3 of the training split of .* is outside 0..9; 1 more"):
        load_splits(str(tmp_path), val_source="digits", label_key="label", label_names=[str(k) for k in range(10)])


def test_sources_that_are_not_there(tmp_path, folder):
    with pytest.raises(BadValue, match=r"no such folder: .*nowhere; give a folder with a folder of images"):
        load_splits(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    with pytest.raises(BadValue, match=r"notes.txt is neither a folder nor a .parquet, .tar or .csv file"):
        load_splits(str(tmp_path / "notes.txt"))
    for image in list((folder / "one").iterdir())[1:]:
        image.unlink()
    with pytest.raises(BadValue, match="a class of a single image can't be split"):
        load_splits(str(folder))


def test_an_empty_split_is_refused(tmp_path):
    rows = load_splits("digits").train.rows
    rows.select(range(4)).to_parquet(tmp_path / "train.parquet")
    rows.select([]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(BadValue, match=r"can't be read: .*test.* corresponds to no data"):
        load_splits(str(tmp_path))


def test_a_saved_parquet_data_set_without_images_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(BadValue, match=r"no image column; its columns are text"):
        load_splits(str(tmp_path))


def pictures(place, count=6):
    for k in range(count):
        (place / str(k % 2)).mkdir(parents=True, exist_ok=True)
        (place / str(k % 2) / f"{k}.png").write_bytes(png(k))


def files_in(split):
    return {row["image"]["path"] for row in split.rows}


def test_images_that_are_evaluated_on_are_not_learned(tmp_path):
    pictures(tmp_path / "data" / "train", 8)
    (tmp_path / "data" / "val" / "0").mkdir(parents=True)
    (tmp_path / "data" / "val" / "0" / "9.png").write_bytes(png(9))
    with pytest.raises(BadValue, match=r"hold the same images; give others to evaluate on \(--val-data\)"):
        load_splits(str(tmp_path / "data"), val_source=str(tmp_path / "data" / "train"))
    some = tmp_path / "some" / "0"
    some.mkdir(parents=True)
    (some / "link.png").symlink_to(tmp_path / "data" / "train" / "0" / "2.png")
    (some / "new.png").write_bytes(png(10))
    splits = load_splits(str(tmp_path / "data"), val_source=str(tmp_path / "some"))
    assert (splits.train.size, splits.test.size) == (7, 2)
    assert not any(path.endswith("0/2.png") for path in files_in(splits.train))
    assert any("1 images of the training split" in said and "evaluated on" in said for said in splits.left_out)


def test_a_table_that_names_a_file_twice_does_not_learn_what_it_evaluates(tmp_path):
    pictures(tmp_path)
    rows = ["file_name,label,split", *(f"{k % 2}/{k}.png,{k % 2},train" for k in range(6)), "0/0.png,0,val"]
    (tmp_path / "list.csv").write_text("\n".join(rows), encoding="utf-8")
    splits = load_splits(str(tmp_path / "list.csv"))
    assert (splits.train.size, splits.test.size) == (5, 1)
    twice = ["file_name,label", *(f"{k % 2}/{k}.png,{k % 2}" for k in range(6))]
    (tmp_path / "twice.csv").write_text("\n".join([*twice, *twice[1:]]), encoding="utf-8")
    splits = load_splits(str(tmp_path / "twice.csv"))
    assert not files_in(splits.train) & files_in(splits.test)


def test_a_row_without_a_split_is_refused(tmp_path):
    pictures(tmp_path, 3)
    (tmp_path / "list.csv").write_text(
        "file_name,label,split\n0/0.png,0,train\n1/1.png,1, \n0/2.png,0,val\n", encoding="utf-8"
    )
    with pytest.raises(BadValue, match=r"1 rows of .*list.csv have no split; name one for each row, or leave"):
        load_splits(str(tmp_path / "list.csv"))


def test_rows_without_an_image_are_not_taken_for_one_another(tmp_path):
    pictures(tmp_path)
    rows = ["file_name,label,split", "0/0.png,0,train", ",1,train", "1/1.png,1,train", "0/2.png,0,val", ",1,val"]
    (tmp_path / "list.csv").write_text("\n".join(rows), encoding="utf-8")
    splits = load_splits(str(tmp_path / "list.csv"))
    assert (splits.train.size, splits.test.size) == (3, 2)
    assert splits.left_out == ()
    image = {"bytes": png(1), "path": None}
    table = datasets.Dataset.from_dict({"image": [None, image, image, image], "label": [0, 1, 0, 1]})
    table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "train.parquet"))
    assert load_splits(str(tmp_path / "train.parquet")).train.size == 2
