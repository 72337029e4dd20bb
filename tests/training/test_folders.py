"""Folders of images as people have them: which rows are read, in which split, and what is said of the rest."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dg_timm._errors import BadValue
from dg_timm.training.data.sources import load_splits
from dg_timm.training.data.summary import describe_data

WORDS = ["train", "test", "val", "validation", "training data", "test_val", "train_interior", "trains", "v1.0", "a.png",
         "größe", "日本", "Train", "TEST", "test-2", "[x]", "b*c", "0", "10", "x::y", "no label"]  # fmt: skip
SUFFIXES = [".png", ".PNG", ".JPG", ".jpeg", ".Bmp"]


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


def fill(root, folders, count=4, suffix=".png"):
    for folder in folders:
        for k in range(count):
            write_image(Path(root) / folder / f"{k}{suffix}")
    return str(root)


def files_of(split):
    names = split.classes
    return {row["image"]["path"]: names[row["label"]] for row in split.rows}


def read(root, **options):
    splits = load_splits(str(root), **options)
    train, test = files_of(splits.train), files_of(splits.test)
    assert not set(train) & set(test)
    return splits, train, test


def test_a_class_may_be_named_like_a_split(tmp_path):
    classes = ("tractor", "train", "trout")
    fill(tmp_path, [f"{split}/{name}" for split in ("train", "test") for name in classes])
    splits, train, test = read(tmp_path)
    assert (splits.train.size, splits.test.size) == (12, 12)
    assert {Path(path).relative_to(tmp_path).parts[0] for path in train} == {"train"}
    assert Counter(test.values()) == dict.fromkeys(classes, 4)


def test_words_in_class_names_decide_nothing(tmp_path):
    classes = ["beach", "kitchen", "train_interior", "train_railway"]
    splits, train, test = read(fill(tmp_path, classes, 6))
    assert splits.label_names == classes
    assert len(train) + len(test) == 24


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_a_class_of_the_first_level_may_be_named_like_a_split(tmp_path, name):
    splits, train, test = read(fill(tmp_path, ["car", name, "bus"]))
    assert splits.label_names == sorted(["car", name, "bus"])
    assert len(train) + len(test) == 12


@pytest.mark.parametrize("only", ["train", "test", "val", "validation"])
def test_a_single_split_is_split(tmp_path, only):
    _, train, test = read(fill(tmp_path, [f"{only}/cat", f"{only}/dog"], 8))
    assert len(train) + len(test) == 16
    assert len(test) == 4
    if only != "train":  # evaluation alone takes all of it
        alone = load_splits(str(tmp_path), only_evaluate=True)
        assert (alone.train.size, alone.test.size) == (0, 16)
    with pytest.raises(BadValue, match=r"--val-split .*holds the rows to train on; .*--val-data"):
        load_splits(str(tmp_path), train_split=only, val_split=only)
    with pytest.raises(BadValue, match=r"--val-data .* holds the rows to train on"):
        load_splits(str(tmp_path), train_split=only, val_source=str(tmp_path), val_split=only)


def test_side_files_are_counted(tmp_path):
    fill(tmp_path, ["cat", "dog"], 8)
    for k in range(8):
        (tmp_path / "cat" / f"{k}.txt").write_text("0 .5 .5 1 1", encoding="utf-8")
    for name in (".DS_Store", "notes.json", "README"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    write_image(tmp_path / ".cache" / "1.png")
    write_image(tmp_path / "cat" / "._2.png")
    write_image(tmp_path / "loose.png")
    (tmp_path / "emu").mkdir()
    splits, train, test = read(tmp_path)
    assert splits.label_names == ["cat", "dog"]
    assert len(train) + len(test) == 16
    assert set(splits.left_out) == {"8 .txt files", "1 .json files", "1 files without a suffix", "3 hidden files",
                                    "1 images outside any class folder", "1 empty folders (emu)"}  # fmt: skip
    line = describe_data(splits, "pets")
    assert line.startswith("data pets: 12 images to train on, 4 images to evaluate on (25 % of ")
    assert "2 classes (cat, dog); left out: " in line
    assert "8 .txt files" in line


def test_splits_that_are_not_used_and_folders_beside_them_are_counted(tmp_path):
    fill(tmp_path, ["train/a", "val/a", "test/a", "extra"], 3)
    write_image(tmp_path / "test" / "0.png")
    splits, train, test = read(tmp_path)
    assert (len(train), len(test)) == (3, 3)
    assert set(splits.left_out) == {"the split test (3 rows)", "1 images in test/ outside any class folder",
                                    "3 images in extra/, beside the splits test, train, val"}  # fmt: skip
    assert len(read(tmp_path, train_split="train", val_split="validation")[2]) == 3  # val by its other name


def test_the_user_may_name_any_folder_as_a_split(tmp_path):
    fill(tmp_path, ["train2017/a", "train2017/b", "dev/b", "dev/a"], 3)
    splits, train, test = read(tmp_path, train_split="train2017", val_split="dev")
    assert (len(train), len(test), splits.label_names) == (6, 6, ["a", "b"])


def test_images_deep_in_a_class_belong_to_it(tmp_path):
    splits, train, test = read(fill(tmp_path, ["train/cat/2020/x", "train/cat", "train/dog/y", "val/dog/z", "val/cat"]))
    assert splits.label_names == ["cat", "dog"]
    assert Counter(train.values()) == {"cat": 8, "dog": 4}
    assert Counter(test.values()) == {"cat": 4, "dog": 4}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/a", "train/b", "other"], r"has the folder train beside other: as a split, .* --train-split train"),
        (["train", "test"], r"test, train of .* hold images and no class folders"),
        ([""], r"holds images and no class folders"),
        (["Train/a", "Test/a"], r"which would be classes: a folder for a split is named train, val, .*--train-split"),
        (["pets/train/a", "pets/val/a"], r"has a single class folder, pets, with train, val in it; give .*pets$"),
        (["train/a", "val/a", "val/b"], r"\['b'\] would never be learned"),
        (["val/a", "test/a"], r"has no split named train, only val"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, folders, message):
    fill(tmp_path, folders)
    with pytest.raises(BadValue, match=message):
        load_splits(str(tmp_path))


def test_a_validation_split_of_some_classes_is_matched_by_name(tmp_path):
    fill(tmp_path, ["train/ant", "train/bee", "train/cow", "val/cow", "val/bee"])
    splits, _, test = read(tmp_path)
    assert splits.label_names == ["ant", "bee", "cow"]
    assert splits.test.classes == ["bee", "cow"]
    assert all(Path(path).parent.name == name for path, name in test.items())


def test_few_images_a_class_give_one_of_each(tmp_path):
    splits, _, test = read(fill(tmp_path, [f"c{k}" for k in range(9)], 2))
    assert Counter(test.values()) == dict.fromkeys(splits.label_names, 1)
    write_image(tmp_path / "alone" / "0.png")
    with pytest.raises(BadValue, match=r"a class of a single image can't be split .*--val-data"):
        load_splits(str(tmp_path))


def test_links_are_followed_and_never_for_ever(tmp_path):
    fill(tmp_path / "far", ["a"])
    fill(tmp_path / "data", ["b"])
    (tmp_path / "data" / "a").symlink_to(tmp_path / "far" / "a")
    (tmp_path / "data" / "b" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    splits, train, test = read(tmp_path / "data")
    assert (splits.label_names, len(train) + len(test)) == (["a", "b"], 8)
    assert set(splits.left_out) == {"1 links to a folder around them", "1 links to nothing"}


def test_an_empty_folder_and_one_without_images(tmp_path):
    with pytest.raises(BadValue, match=r"holds no files; give a folder with a folder of images for each class"):
        load_splits(str(tmp_path))
    (tmp_path / "notes.xyz").write_text("x", encoding="utf-8")
    with pytest.raises(BadValue, match=r"holds no images \(1 .xyz files\)"):
        load_splits(str(tmp_path))


CLASSES = st.lists(st.sampled_from(WORDS), min_size=2, max_size=5, unique=True)
DEEPER = st.lists(st.sampled_from(["", "train", "test/val", "2020", "no label"]), min_size=1, max_size=2, unique=True)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    classes=CLASSES,
    splits=st.sampled_from([(), ("train", "val"), ("train", "test"), ("train", "validation", "test"), ("test",)]),
    deeper=DEEPER,
    suffix=st.sampled_from(SUFFIXES),
    count=st.integers(2, 4),
    file_prefix=st.sampled_from(["", "train-", "test.", "val 1 "]),
)
def test_every_image_is_read_once_in_its_split_and_class(classes, splits, deeper, suffix, count, file_prefix):
    with tempfile.TemporaryDirectory() as place:
        root = Path(place).resolve()
        expected = {}
        classes = classes if splits else [*classes, "neither"]  # test/ and train/ alone, without classes, are refused
        for split in splits or ("",):
            for name in classes:
                for inside in deeper if splits else [""]:
                    for k in range(count):
                        path = root / split / name / inside / f"{file_prefix}{k}{suffix}"
                        write_image(path)
                        expected[str(path)] = (split, name)
                (root / split / name / "side.txt").write_text("x", encoding="utf-8")
        found, train, test = read(root)
        assert found.label_names == sorted(classes)
        unused = sum("the split" in line for line in found.left_out)
        rows = {**train, **test}
        assert all(expected[path][1] == name for path, name in rows.items())
        left = [path for path in expected if path not in rows]
        assert bool(left) == bool(unused)
        if len(splits) > 1:
            assert {expected[path][0] for path in train} == {"train"}
            assert {expected[path][0] for path in test} == {splits[1]}
            assert {expected[path][0] for path in left} == set(splits[2:])
        assert f"{len(classes) * len(splits or ('',))} .txt files" in found.left_out
