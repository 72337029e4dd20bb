"""Shards and tables of files: which split a file belongs to, and what is said of the rest."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import fsspec
import pytest
from PIL import Image

from dg_timm._errors import BadValue
from dg_timm.training.data.opening import open_source
from dg_timm.training.data.sources import load_splits
from tests.helpers.files import DIGITS, image_folder, png, shards


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def write_parquet(file, rows=4):
    file.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = {"image": [{"bytes": png(k), "path": None} for k in range(rows)], "label": [0, 1] * (rows // 2)}
    datasets.Dataset.from_dict(table, features=features).to_parquet(file)


@pytest.mark.parametrize(
    ("files", "sizes"),
    [
        (["train.parquet", "test.parquet"], {"train": 4, "test": 4}),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], {"train": 8}),
        (["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
         {"train": 4, "validation": 4}),
        (["train/0.parquet", "val/test-set.parquet"], {"train": 4, "val": 4}),
        (["trained_birds.parquet", "my test of birds.parquet", "latest.parquet"], {"train": 12}),
        (["[train]/birds.parquet"], {"train": 4}),
    ],
)  # fmt: skip
def test_a_file_belongs_to_a_split_by_its_whole_name(tmp_path, files, sizes):
    for file in files:
        write_parquet(tmp_path / file)
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "preview.png").write_bytes(png(0))
    opened = open_source(str(tmp_path), streaming=False)
    assert {name: len(part) for name, part in opened.parts.items()} == sizes
    assert opened.left_out == ["1 images beside the .parquet files", "1 .txt files"]


def test_files_of_no_split_beside_others_are_refused(tmp_path):
    for file in ("train.parquet", "more_birds.parquet"):
        write_parquet(tmp_path / file)
    with pytest.raises(BadValue, match=r"files that belong to none: more_birds.parquet. Name a file .* train-0"):
        load_splits(str(tmp_path))


def test_webdataset_shards_by_folder(tmp_path):
    for split in ("train", "val"):
        shards(tmp_path / split, count=2 if split == "train" else 1)
    sizes = {name: len(part) for name, part in open_source(str(tmp_path), streaming=False).parts.items()}
    assert sizes == {"train": 10, "val": 5}


def test_a_saved_data_set_of_one_split(tmp_path):
    write_parquet(tmp_path / "rows.parquet", 20)
    rows = load_splits(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict(test=rows.train.rows).save_to_disk(tmp_path / "saved")
    splits = load_splits(str(tmp_path / "saved"))
    assert (splits.train.size, splits.test.size) == (12, 4)
    assert load_splits(str(tmp_path / "saved"), only_evaluate=True).test.size == 16


def listed(folder, text, name="labels.csv"):
    image_folder(folder / "pictures", 10)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def lines_of(labels, places=("one", "two")):
    rows = [f"pictures/{place}/{k}.png,{label}" for place, label in zip(places, labels, strict=True) for k in range(10)]
    return "file_name,label\n" + "\n".join(rows) + "\n"


@pytest.mark.parametrize(
    ("labels", "names"),
    [(("NA", "None"), ["NA", "None"]), (("0", "1"), ["0", "1"]), (("007", "7"), ["007", "7"]), (("größe", "x"),
                                                                                             ["größe", "x"])],
)  # fmt: skip
def test_a_table_of_files_and_labels(tmp_path, labels, names):
    splits = load_splits(listed(tmp_path, lines_of(labels)))
    assert sorted(splits.label_names) == sorted(names)
    assert (splits.train.size, splits.test.size) == (16, 4)
    for row in splits.test.rows:
        folder = row["image"]["path"].split("/")[-2]
        label = row["label"] if isinstance(row["label"], str) else str(row["label"])
        assert label == labels[["one", "two"].index(folder)]


def test_metadata_in_a_folder_of_images_is_used(tmp_path):
    text = lines_of(("a", "b")).replace("pictures/", "")
    image_folder(tmp_path / "data", 11)
    (tmp_path / "data" / "metadata.csv").write_text(text, encoding="utf-8")
    (tmp_path / "data" / "notes.csv").write_text("x", encoding="utf-8")
    splits = load_splits(str(tmp_path / "data"))
    assert (splits.train.size, splits.test.size) == (16, 4)
    assert splits.left_out == ("2 images that no metadata file names", "1 .csv files")


def test_json_lines_in_the_folders_of_splits(tmp_path):
    for split in ("train", "val"):
        image_folder(tmp_path / split, 4)
        rows = [{"file_name": f"one/{k}.png", "label": "odd" if k % 2 else "even"} for k in range(4)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    splits = load_splits(str(tmp_path))
    assert (splits.train.size, splits.test.size, splits.label_names) == (4, 4, ["even", "odd"])


def test_a_column_names_the_split(tmp_path):
    lines = lines_of(("a", "b")).splitlines()
    text = "\n".join([lines[0] + ",split", *(f"{line},{'test' if k % 5 == 0 else 'train'}" for k, line in
                                             enumerate(lines[1:]))])  # fmt: skip
    splits = load_splits(listed(tmp_path, text))
    assert (splits.train.size, splits.test.size) == (16, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("who,label\nx.png,a\n", "has no column of file names; its columns are who, label"),
        ("file_name,label\nnowhere.png,a\n", r"names no file that exists: \['nowhere.png'\] was looked for in"),
        ("", "can't be read"),
        ("file_name,kind\npictures/one/0.png,a\n", "has no label column; name one with --label-key"),
    ],
)
def test_a_table_that_names_no_files_is_refused(tmp_path, text, message):
    with pytest.raises(BadValue, match=message):
        load_splits(listed(tmp_path, text))


def test_a_row_whose_file_is_missing_is_one_bad_row(tmp_path):
    from dg_timm.training.data.images import Images, Unreadable
    from dg_timm.training.data.samplers import SampleKey

    file = listed(tmp_path, lines_of(("a", "b")))
    (tmp_path / "pictures" / "one" / "0.png").unlink()
    splits = load_splits(file)
    read = [Images(split, Image.Image.copy, ["a", "b"])[SampleKey(0, 0, k)]
            for split in (splits.train, splits.test) for k in range(split.size)]  # fmt: skip
    (bad,) = [one for one in read if isinstance(one, Unreadable)]
    assert "pictures/one/0.png" in bad.where


def test_a_mistyped_folder_is_not_looked_for_on_the_hub_alone(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(BadValue, match=r"m/nosuch is neither a file or folder here nor .* of the Hub .*offline"):
        load_splits("m/nosuch")


def test_shards_in_object_storage_are_streamed_by_file(tmp_path):
    memory = fsspec.filesystem("memory")
    for name, count in (("train", 3), ("val", 1)):
        for file in sorted(shards(tmp_path / name, count=count, rows=4).glob("*.tar")):
            memory.pipe(f"/bucket/{name}/{file.name}", file.read_bytes())
    options = {"val_source": "memory://bucket/val/*.tar", "num_classes": 10}
    found = load_splits("memory://bucket/train/train-*.tar", streaming=True, **options)
    assert found.train.rows.num_shards == 3
    assert len(list(found.train.rows)) == 12
    assert [row["label"] for row in found.test.rows] == list(DIGITS.target[:4])


def test_shards_of_a_web_server(tmp_path):
    folder = shards(tmp_path / "train", count=1, rows=4)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietFiles, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/train-000.tar"
        found = load_splits(address, streaming=True, val_source=str(folder), num_classes=10)
        assert [row["label"] for row in found.train.rows] == list(DIGITS.target[:4])
        server.shutdown()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://bucket/none-*.tar", "none-.* matches no file"),
        ("memory://bucket/train", r"names no .parquet or .tar files: give e.g. s3://bucket/train-\*.tar"),
        ("nosuch://bucket/a.tar", "nosuch://bucket/a.tar can't be read: .*nosuch"),
        ("https://me:secret@host/a.tar", "given with a password or a query"),
        ("https://host/a.tar?signature=secret", "given with a password or a query"),
    ],
)
def test_addresses_that_can_not_be_used(source, message):
    with pytest.raises(BadValue, match=message) as caught:
        load_splits(source, streaming=True, num_classes=10)
    assert "secret" not in str(caught.value)
