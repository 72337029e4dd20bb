"""COCO annotation files: what is read, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dg_timm._errors import BadValue
from dg_timm.detection.data import boxes
from dg_timm.detection.data.annotations import DataOptions, load_detection
from dg_timm.detection.data.boxes import Categories, to_corners
from dg_timm.detection.data.summary import describe_detection_data, draw_detection_samples
from tests.helpers.detection import BCCD, with_box, write_coco


def test_a_coco_folder(tmp_path):
    splits = load_detection(write_coco(tmp_path))
    assert splits.categories == Categories(["a", "b"], [3, 7])
    first, second, third = splits.train.rows
    assert first.boxes.tolist() == [[1, 2, 11, 22], [30, 0, 60, 40]]  # rounding over the edge is clipped
    assert first.labels.tolist() == [1, 2]
    assert first.area.tolist() == [150, 1200]
    assert first.size == (40, 60)
    assert second.crowd.tolist() == [True]
    assert third.boxes.shape == (0, 4)  # an image without boxes is valid
    assert splits.train.boxes == 2  # the crowd is none
    assert [row.image_id for row in load_detection(str(tmp_path), DataOptions(skip_empty=True)).train.rows] == [10]


@pytest.mark.parametrize(
    "layout", ["annotations/instances_train2017.json", "train/_annotations.coco.json", "train.json"]
)
def test_other_layouts_of_coco(tmp_path, layout):
    folder = Path(write_coco(tmp_path))
    split = "train2017" if "2017" in layout else "train"
    (folder / layout).parent.mkdir(exist_ok=True)
    (folder / "instances_train.json").rename(folder / layout)
    if layout != "train.json":
        shutil.copytree(folder / "images", folder / split, dirs_exist_ok=True)
    assert load_detection(str(folder)).train.size == 3


@pytest.mark.parametrize(
    ("box", "what"),
    [([5, 5, 0, 10], "zero or negative"), ([5, 5, 10, -2], "zero or negative"), ([55, 5, 10, 10], "outside its image"),
     ([-5, 0, 10, 10], "outside its image"), ([80, 80, 5, 5], "outside its image"), ([5, 5, 10], "not four numbers"),
     (None, "not four numbers"), ([5, 5, math.inf, 1], "zero or negative|outside"), ([50, 5, 1e-7, 10], "zero or neg")],
)  # fmt: skip
def test_bad_boxes_are_named_or_counted(tmp_path, box, what):
    folder = write_coco(tmp_path, annotations=json.loads(json.dumps(with_box(box))))
    with pytest.raises(BadValue, match=rf"1 bad boxes \(--drop-bad-boxes.*\n.*annotation 5 of image 10.*({what})"):
        load_detection(folder)
    splits = load_detection(folder, DataOptions(drop_bad_boxes=True))
    assert splits.train.dropped == 1
    assert splits.train.boxes == 1


@pytest.mark.parametrize(
    ("changed", "error"),
    [(dict(annotations=with_box([0, 0, 5, 5], category_id=9)), "annotation 5 of image 10 .*id 9.*3: 'a', 7: 'b'"),
     (dict(annotations=with_box([0, 0, 5, 5], image_id=99)), "annotation 5 .*image 99"),
     (dict(annotations=["box"]), "an annotation of .* is 'box'"),
     (dict(annotations=with_box([0, 0, 5, 5], category_id=[3])), r"category id \[3\]"),
     (dict(annotations=with_box([0, 0, 5, 5], image_id=[10])), r"annotation 5 .*image \[10\]"),
     (dict(annotations=with_box([0, 0, 5, 5], area="big")), "annotation 5 .* has the area 'big'"),
     (dict(images=[{"id": 1, "file_name": "0.png", "width": 60, "height": None}]), "image 1 .* has the height None"),
     (dict(images=["0.png"]), "an image of .* has no id: '0.png'"),
     (dict(images=[]), "has no images"),
     (dict(categories=[]), "has no categories"),
     (dict(categories=[{"id": True, "name": "a"}]), "has no id or name: .*True"),
     (dict(categories=[{"id": 2.7, "name": None}]), "has no id or name: .*2.7"),
     (dict(annotations=with_box("1199")), "the box '1199', which is not four numbers"),
     (dict(annotations=with_box([True, 1, 9, 9])), "which is not four numbers"),
     (dict(annotations=with_box([0, 0, 5, 5], category_id=True)), "category id True"),
     (dict(images=[{"id": k, "file_name": "0.png", "width": 60, "height": 40} for k in (10, 11, 12)]),
      "3 images of .* name the file 0.png"),
     (dict(categories="b"), "no list of categories"),
     (dict(categories=[{"id": 3, "name": "a"}, {"id": 7, "name": "c"}], annotations=with_box([0, 0, 5, 5])),
      r"the categories to evaluate on, \{3: 'a', 7: 'b'\}, are not \{3: 'a', 7: 'c'\}"),
     (dict(annotations=with_box([0, 0, 5, 5], iscrowd="no")), "annotation 5 .* has the iscrowd 'no', .* 0 nor 1"),
     (dict(images=[{"id": 1, "file_name": "0.png"}]), "has the width None")],
)  # fmt: skip
def test_what_is_no_coco_is_refused(tmp_path, changed, error):
    folder = write_coco(tmp_path, **changed)
    with pytest.raises(BadValue, match=error):
        load_detection(folder)


@pytest.mark.parametrize(
    ("content", "error"), [("", "is empty"), ("{", "is not valid JSON"), ("[]", "not a COCO annotation file")]
)
def test_an_empty_or_broken_file_is_named(tmp_path, content, error):
    folder = write_coco(tmp_path)
    (tmp_path / "instances_train.json").write_text(content, encoding="utf-8")
    with pytest.raises(BadValue, match=f"instances_train.json.*{error}"):
        load_detection(folder)


def test_images_below_the_given_folder_by_split(tmp_path):
    folder = Path(write_coco(tmp_path / "data"))
    for split in ("train", "val"):
        shutil.copytree(folder / "images", tmp_path / "elsewhere" / split)
    shutil.rmtree(folder / "images")
    splits = load_detection(str(folder), DataOptions(image_folder=str(tmp_path / "elsewhere")))
    assert "elsewhere/train" in splits.train.rows[0].source
    assert "elsewhere/val" in splits.test.rows[0].source


def test_a_detector_is_evaluated_without_a_training_split(tmp_path):
    folder = write_coco(tmp_path)
    (tmp_path / "instances_train.json").unlink()
    splits = load_detection(folder, known=Categories(["a", "b"], [3, 7]))
    assert (splits.train.size, splits.test.size) == (0, 3)
    with pytest.raises(BadValue, match=r"the categories to evaluate on, .* are not \{3: 'x'\}"):
        load_detection(folder, known=Categories(["x"], [3]))


def test_missing_files_are_named(tmp_path):
    folder = write_coco(tmp_path)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(BadValue, match=r"1 of 3 images of .*instances_train.json.*: 1\.png"):
        load_detection(folder)
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "1.png")
    with pytest.raises(BadValue, match=r"image 0.png .*--image-folder"):
        load_detection(folder, DataOptions(image_folder=str(tmp_path / "elsewhere")))
    with pytest.raises(BadValue, match=r"no such annotation file: nothing\.json.*there are instances_train.json"):
        load_detection(folder, DataOptions(train_annotations="nothing.json"))
    with pytest.raises(BadValue, match=r"no annotation file to evaluate on.*--val-split"):
        load_detection(folder, DataOptions(val_split="test"))
    with pytest.raises(BadValue, match=r"no annotation file for spring.*there are instances_train.json"):
        load_detection(folder, DataOptions(train_split="spring"))


def test_the_real_data_set_is_read_whole():
    if not BCCD.exists():
        pytest.skip("needs BCCD")
    splits = load_detection(str(BCCD), DataOptions(val_split="test"))
    assert (splits.train.size, splits.train.boxes, splits.test.size, splits.test.boxes) == (205, 2804, 72, 945)
    assert splits.categories.by_id == {1: "Platelets", 2: "RBC", 3: "WBC"}
    assert np.bincount(np.concatenate([row.labels for row in splits.test.rows])).tolist() == [0, 69, 805, 71]


def test_box_formats_agree():
    corners = [6.0, 4.0, 18.0, 12.0]
    assert to_corners([6, 4, 12, 8], "coco", (40, 60)) == corners
    assert to_corners(corners, "voc", (40, 60)) == corners
    assert np.allclose(to_corners([0.2, 0.2, 0.2, 0.2], "yolo", (40, 60)), corners)
    assert set(boxes.BOX_FORMATS) == {"coco", "voc", "yolo"}


def test_many_bad_boxes_are_counted_and_the_first_ones_named(tmp_path):
    bad = [{"id": k, "image_id": 10, "category_id": 3, "bbox": [0, 0, 0, 1]} for k in range(20)]
    with pytest.raises(BadValue, match=r"20 bad boxes(?s:.*)annotation 7 (?s:.*)\n  \.\.\.$") as refused:
        load_detection(write_coco(tmp_path, annotations=bad))
    assert "annotation 8 " not in str(refused.value)


def test_a_file_of_another_folder_may_be_named(tmp_path):
    write_coco(tmp_path / "data")
    (tmp_path / "data" / "instances_train.json").rename(tmp_path / "mine.json")
    for given in (str(tmp_path / "mine.json"), "../mine.json"):
        splits = load_detection(str(tmp_path / "data"), DataOptions(train_annotations=given))
        assert splits.train.boxes == 2


@pytest.mark.parametrize(
    ("part", "error"),
    [("images", "has two images with the id 10"), ("categories", "two categories .* have the same id")],
)
def test_an_id_is_given_once(tmp_path, part, error):
    folder = write_coco(tmp_path)
    file = tmp_path / "instances_train.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content[part].append(content[part][0])
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BadValue, match=error):
        load_detection(folder)


@pytest.mark.parametrize(("crowd", "is_crowd"), [("0", False), (0.0, False), (None, False), ("1", True), (True, True)])
def test_a_crowd_may_be_text(tmp_path, crowd, is_crowd):
    folder = write_coco(tmp_path, annotations=with_box([0, 0, 5, 5], iscrowd=crowd, area="25"))
    splits = load_detection(folder)
    assert [row.crowd.tolist() for row in splits.train.rows] == [[is_crowd], [False], []]
    assert splits.train.boxes == 2 - is_crowd
    assert splits.train.rows[0].area.tolist() == [25]


def test_categories_are_matched_by_name(tmp_path):
    """The two files number the same classes differently, and the one to evaluate on has a class less."""
    folder = write_coco(tmp_path)
    file = tmp_path / "instances_val.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["categories"] = [{"id": 3, "name": "b"}]  # which is 7 in the file to train on
    content["annotations"] = [{"id": 1, "image_id": 10, "category_id": 3, "bbox": [1, 2, 10, 20]}]
    file.write_text(json.dumps(content), encoding="utf-8")
    splits = load_detection(folder)
    assert splits.categories == Categories(["a", "b"], [3, 7])
    assert splits.test.rows[0].labels.tolist() == [2]


def test_images_that_both_files_name_are_evaluated_on_and_not_learned(tmp_path):
    folder = write_coco(tmp_path)
    file = tmp_path / "instances_val.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["images"][1]["file_name"] = "1.png"
    file.write_text(json.dumps(content), encoding="utf-8")
    splits = load_detection(folder)
    assert [row.image_id for row in splits.train.rows] == [10, 12]
    assert splits.test.size == 3
    assert splits.left_out == (
        f"1 images in {tmp_path / 'images'} that are in no annotation file that was read",
        f"1 images of instances_train.json of {folder} from training, because they are evaluated on",
    )
    other_way = load_detection(folder, DataOptions(val_source=f"{folder}/images/.."))
    assert [row.image_id for row in other_way.train.rows] == [10, 12]
    assert other_way.left_out == splits.left_out
    for image in content["images"]:
        image["file_name"] = image["file_name"].removeprefix("val")
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BadValue, match=r"instances_train.json .* and instances_val.json .* name the same images"):
        load_detection(folder)


def test_a_line_and_a_picture_say_what_the_data_hold(tmp_path):
    folder = write_coco(tmp_path / "data", annotations=[*with_box([0, 0, 5, 5]), *with_box([5, 5, 0, 0])])
    Image.new("RGB", (60, 40)).save(tmp_path / "data" / "images" / "unnamed.JPG")
    splits = load_detection(folder, DataOptions(drop_bad_boxes=True))
    assert describe_detection_data(splits, "D") == (
        "data D: 3 images with 3 boxes to train on, 3 images with 2 boxes to evaluate on "
        f"(instances_val.json of {folder}); 2 classes (a, b); "
        f"left out: 1 bad boxes of instances_train.json of {folder}; "
        f"1 images in {folder}/images that are in no annotation file that was read"
    )
    assert load_detection("digits").left_out == ()
    picture = tmp_path / "samples.png"
    assert draw_detection_samples(splits.train, splits.categories, picture) == 3
    with Image.open(picture) as drawn:
        pixels = np.asarray(drawn)
    assert (pixels == [255, 0, 0]).all(-1).any()  # a box
    with pytest.raises(BadValue, match="can't be written"):
        draw_detection_samples(splits.train, splits.categories, tmp_path / "samples.xyz")


def test_one_file_is_not_learned_and_evaluated(tmp_path):
    folder = write_coco(tmp_path)
    with pytest.raises(BadValue, match=r"holds the images to train on; name others .* --val-annotations"):
        load_detection(folder, DataOptions(val_split="train"))
