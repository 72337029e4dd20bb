"""Detection: boxes that are checked, detectors over any backbone, figures that are COCO's, runs that lose nothing."""

import csv
import importlib.util
import io
import json
import math
import random
import re
import shlex
import shutil
import signal
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.ops import box_iou

import dg_timm
from dg_timm.detection import detectors
from dg_timm.detection.data import boxes
from dg_timm.detection.data.annotations import load_detection
from dg_timm.detection.data.boxes import Annotated, Categories, DetectionSplit, to_corners
from dg_timm.detection.data.loading import DetectionCollate, DetectionImages, make_transform, read_image
from dg_timm.detection.detectors import (
    DETECTORS,
    STRIDES,
    Options,
    create_body,
    create_detector,
    freeze_backbone,
    load_detector,
    write_detector_config,
)
from dg_timm.detection.evaluation import Detections, average_precision, coco_results, detect
from dg_timm.detection.objective import Detection
from dg_timm.detection.plot import detector_statistics, draw_detections
from dg_timm.graph.stage import graph_stages
from dg_timm.training.data.loading import IndexOrder, Key, Loader, Share
from dg_timm.training.loop.distributed import StopRequest
from dg_timm.training.run import networks as models
from tests.helpers.networks import randomize_graph
from tests.training.kill_and_resume import DETECT, finish, kill, start, state
from tests.training.test_train import rows, run

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"
SMALL = Options(min_size=(96,), max_size=128, fpn_channels=64, anchor_size=8, roi_batch=16)
NAMES = ["a", "b"]


@pytest.fixture(scope="module")
def pages():
    return load_detection("digits")


def detector(kind="faster_rcnn", backbone="dg_test_resnet", options=SMALL, **others):
    return create_detector(kind, backbone, NAMES, [3, 7], options, **others)


# --------------------------------------------------------------------------- annotations


def coco(folder: Path, **changed):
    """A COCO data set of three images, one of them without boxes; ``changed`` replaces parts of the training file."""
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.full((40, 60, 3), 40 * number, dtype=np.uint8)).save(folder / "images" / f"{number}.png")
    images = [{"id": 10 + k, "file_name": f"{k}.png", "width": 60, "height": 40} for k in range(3)]
    boxes = [
        {"id": 1, "image_id": 10, "category_id": 3, "bbox": [1, 2, 10, 20], "area": 150.0, "iscrowd": 0},
        {"id": 2, "image_id": 10, "category_id": 7, "bbox": [30, 0, 30, 40.4], "area": 1200, "iscrowd": 0},
        {"id": 3, "image_id": 11, "category_id": 7, "bbox": [0, 0, 60, 40], "area": 2400, "iscrowd": 1},
    ]
    whole = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]}
    (folder / "instances_val.json").write_text(json.dumps(whole))
    (folder / "instances_train.json").write_text(json.dumps({**whole, **changed}))
    return str(folder)


def with_box(box, **others):
    return [{"id": 5, "image_id": 10, "category_id": 3, "bbox": box, **others},
            {"id": 6, "image_id": 11, "category_id": 3, "bbox": [0, 0, 5, 5]}]  # fmt: skip


def test_a_coco_folder(tmp_path):
    splits = load_detection(coco(tmp_path))
    assert splits.categories == Categories(["a", "b"], [3, 7])
    first, second, third = splits.train.rows
    assert first.boxes.tolist() == [[1, 2, 11, 22], [30, 0, 60, 40]]  # rounding over the edge is clipped
    assert first.labels.tolist() == [1, 2]
    assert first.area.tolist() == [150, 1200]
    assert first.size == (40, 60)
    assert second.crowd.tolist() == [True]
    assert third.boxes.shape == (0, 4)  # an image without boxes is valid
    assert splits.train.boxes == 2  # the crowd is none
    assert [row.image_id for row in load_detection(str(tmp_path), skip_empty=True).train.rows] == [10]


@pytest.mark.parametrize(
    "layout", ["annotations/instances_train2017.json", "train/_annotations.coco.json", "train.json"]
)
def test_other_layouts_of_coco(tmp_path, layout):
    folder = Path(coco(tmp_path))
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
    folder = coco(tmp_path, annotations=json.loads(json.dumps(with_box(box))))
    with pytest.raises(ValueError, match=rf"1 bad boxes \(--drop-bad-boxes.*\n.*annotation 5 of image 10.*({what})"):
        load_detection(folder)
    splits = load_detection(folder, drop_bad_boxes=True)
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
     (dict(categories="b"), "no list of categories"),
     (dict(categories=[{"id": 3, "name": "a"}, {"id": 8, "name": "b"}], annotations=with_box([0, 0, 5, 5])),
      r"the categories to evaluate on, \{3: 'a', 7: 'b'\}, are not \{3: 'a', 8: 'b'\}"),
     (dict(images=[{"id": 1, "file_name": "0.png"}]), "has the width None")],
)  # fmt: skip
def test_what_is_no_coco_is_refused(tmp_path, changed, error):
    folder = coco(tmp_path, **changed)
    with pytest.raises(ValueError, match=error):
        load_detection(folder)


@pytest.mark.parametrize(
    ("content", "error"), [("", "is empty"), ("{", "is no JSON"), ("[]", "no COCO annotation file")]
)
def test_an_empty_or_broken_file_is_named(tmp_path, content, error):
    folder = coco(tmp_path)
    (tmp_path / "instances_train.json").write_text(content)
    with pytest.raises(ValueError, match=f"instances_train.json.*{error}"):
        load_detection(folder)


def test_images_below_the_given_folder_by_split(tmp_path):
    folder = Path(coco(tmp_path / "data"))
    for split in ("train", "val"):
        shutil.copytree(folder / "images", tmp_path / "elsewhere" / split)
    shutil.rmtree(folder / "images")
    splits = load_detection(str(folder), image_folder=str(tmp_path / "elsewhere"))
    assert "elsewhere/train" in splits.train.rows[0].place
    assert "elsewhere/val" in splits.test.rows[0].place


def test_a_detector_is_evaluated_without_a_training_split(tmp_path):
    folder = coco(tmp_path)
    (tmp_path / "instances_train.json").unlink()
    splits = load_detection(folder, known=Categories(["a", "b"], [3, 7]))
    assert (splits.train.size, splits.test.size) == (0, 3)
    with pytest.raises(ValueError, match=r"the categories to evaluate on, .* are not \{3: 'x'\}"):
        load_detection(folder, known=Categories(["x"], [3]))


def test_missing_files_are_named(tmp_path):
    folder = coco(tmp_path)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images of .*instances_train.json.*: 1\.png"):
        load_detection(folder)
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "1.png")
    with pytest.raises(FileNotFoundError, match=r"image 0.png .*--image-folder"):
        load_detection(folder, image_folder=str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"no annotation file nothing\.json.*there are instances_train.json"):
        load_detection(folder, train_annotations="nothing.json")
    with pytest.raises(FileNotFoundError, match=r"no annotation file to evaluate on.*--val-split"):
        load_detection(folder, val_split="test")
    with pytest.raises(FileNotFoundError, match=r"no annotation file for spring.*there are instances_train.json"):
        load_detection(folder, train_split="spring")


def test_the_real_data_set_is_read_whole():
    if not BCCD.exists():
        pytest.skip("needs BCCD")
    splits = load_detection(str(BCCD), val_split="test")
    assert (splits.train.size, splits.train.boxes, splits.test.size, splits.test.boxes) == (205, 2804, 72, 945)
    assert splits.categories.by_id == {1: "Platelets", 2: "RBC", 3: "WBC"}
    assert np.bincount(np.concatenate([row.labels for row in splits.test.rows])).tolist() == [0, 69, 805, 71]


def table(boxes, categories, names=("a", "b"), as_columns=False, **columns):
    category = (
        ClassLabel(names=list(names)) if names else Value("string" if isinstance(categories[0], str) else "int64")
    )
    kinds = {"bbox": List(Value("float64")), "category": category}
    objects = {k: List(v) for k, v in kinds.items()} if as_columns else List(kinds)
    things = [{"bbox": b, "category": c} for b, c in zip(boxes, categories, strict=True)]
    listed = {"bbox": list(boxes), "category": list(categories)} if as_columns else things
    features = {"picture": ImageFeature(), "objects": objects, **{key: Value("int64") for key in columns}}
    image = Image.fromarray(np.zeros((40, 60, 3), np.uint8))
    data = {"picture": [image], "objects": [listed], **columns}
    return Dataset.from_dict(data, features=Features(features))


@pytest.mark.parametrize("as_columns", [True, False])
@pytest.mark.parametrize(
    ("box_format", "box"), [("coco", [6, 4, 12, 8]), ("voc", [6, 4, 18, 12]), ("yolo", [0.2, 0.2, 0.2, 0.2])]
)
def test_data_sets_of_the_hub(tmp_path, as_columns, box_format, box):
    for split in ("train", "test"):
        table([box], [1], as_columns=as_columns, image_id=[77]).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_detection(str(tmp_path), box_format=box_format)
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
        table(**columns).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=error):
        load_detection(str(tmp_path))


def test_a_data_set_saved_to_disk(tmp_path):
    splits = {"train": table([[0, 0, 9, 9]], [0]), "test": table([[1, 1, 9, 9]], [1])}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    assert load_detection(str(tmp_path / "data")).test.rows[0].labels.tolist() == [2]


def test_splits_may_have_different_categories(tmp_path):
    """Without ClassLabel the categories are those that any of the two splits has."""
    table([[0, 0, 9, 9], [1, 1, 9, 9]], ["dog", "cat"], names=None).to_parquet(tmp_path / "train.parquet")
    table([[0, 0, 9, 9]], ["emu"], names=None).to_parquet(tmp_path / "test.parquet")
    splits = load_detection(str(tmp_path))
    assert splits.categories.names == ["cat", "dog", "emu"]
    assert splits.test.rows[0].labels.tolist() == [3]
    known = Categories(["dog", "emu"], [0, 1])  # of a detector
    assert load_detection(str(tmp_path), known=known).test.rows[0].labels.tolist() == [2]


def test_a_classification_data_set_is_refused(tmp_path):
    table([[0, 0, 9, 9]], [0]).remove_columns("objects").to_parquet(tmp_path / "train.parquet")
    shutil.copy(tmp_path / "train.parquet", tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"has the columns picture; detection needs .*objects"):
        load_detection(str(tmp_path))


def test_texts_are_categories_too(tmp_path):
    for split in ("train", "test"):
        table([[0, 0, 9, 9], [1, 1, 9, 9]], ["dog", "cat"], names=None).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_detection(str(tmp_path))
    assert splits.categories.names == ["cat", "dog"]
    assert splits.train.rows[0].labels.tolist() == [2, 1]


def test_box_formats_agree():
    corners = [6.0, 4.0, 18.0, 12.0]
    assert to_corners([6, 4, 12, 8], "coco", (40, 60)) == corners
    assert to_corners(corners, "voc", (40, 60)) == corners
    assert np.allclose(to_corners([0.2, 0.2, 0.2, 0.2], "yolo", (40, 60)), corners)
    assert set(boxes.BOX_FORMATS) == {"coco", "voc", "yolo"}


# --------------------------------------------------------------------------- images


def test_boxes_move_with_their_digits(pages):
    """A flipped page has its boxes where its ink is: what a box holds is the flip of what it held."""
    still = DetectionImages(pages.train, make_transform())[Key(0, 0, 3)]
    turned = DetectionImages(pages.train, make_transform(augment=True, hflip=1.0), seed=0)[Key(0, 0, 3)]
    image, target, _ = still
    flipped, moved, _ = turned
    assert torch.equal(flipped, image.flip(2))
    for (a, b, c, d), (e, f, g, h) in zip(target["boxes"].int().tolist(), moved["boxes"].int().tolist(), strict=True):
        assert torch.equal(image[:, b:d, a:c].flip(2), flipped[:, f:h, e:g])


def test_augmentation_is_that_of_the_row_and_epoch(pages):
    transform = make_transform(augment=True, photometric=1.0, crop=1.0, zoom_out=0.5)
    images = DetectionImages(pages.train, transform, seed=1)
    for key in (Key(0, 0, 0), Key(1, 0, 0), Key(0, 0, 5)):
        first, boxes, _ = images[key]
        torch.rand(7)
        again, same, _ = images[key]
        assert torch.equal(first, again)
        assert torch.equal(boxes["boxes"], same["boxes"])
        assert (boxes["boxes"][:, 2:] > boxes["boxes"][:, :2]).all()
        height, width = first.shape[1:]
        assert (boxes["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert len(boxes["boxes"]) == len(boxes["labels"])
    assert images[Key(0, 0, 0)][0].shape != images[Key(1, 0, 0)][0].shape or not torch.equal(
        images[Key(0, 0, 0)][0], images[Key(1, 0, 0)][0]
    )


def test_crowds_are_not_learned(tmp_path):
    splits = load_detection(coco(tmp_path))
    _, target, _ = DetectionImages(splits.train, make_transform())[Key(0, 0, 1)]
    assert target["boxes"].shape == (0, 4)


def test_an_image_of_another_size_or_turned(tmp_path):
    splits = load_detection(coco(tmp_path))
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / "images" / "0.png")
    fault = DetectionImages(splits.train, make_transform())[Key(0, 0, 0)]
    assert re.search(r"image 10 .* is 60 x 50, and its annotation says 60 x 40", fault)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(tmp_path / "images" / "1.png", exif=exif)
    image, _, _ = DetectionImages(splits.train, make_transform())[Key(0, 0, 1)]
    assert image.shape == (3, 40, 60)
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    assert "image 12" in DetectionImages(splits.train, make_transform())[Key(0, 0, 2)].where


def test_a_short_batch_is_filled_up(pages):
    images = DetectionImages(pages.train, make_transform())
    batch = DetectionCollate(4)([images[Key(0, 0, k)] for k in range(3)])
    assert batch.weights.tolist() == [1, 1, 1, 0]
    assert len(batch.images) == len(batch.targets) == 4
    assert batch.rows.tolist() == [[0, 0], [0, 1], [0, 2], [0, 0]]
    assert DetectionCollate(2)([]).weights.tolist() == [0, 0]


# --------------------------------------------------------------------------- detectors


def classifier_file(name, folder):
    """Weights of a static classifier whose norm statistics are not trivial, as those of a trained one are."""
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    save_file(model.state_dict(), folder / "model.safetensors")
    return str(folder / "model.safetensors")


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_050", "regnetx_002"])
@pytest.mark.parametrize("kind", DETECTORS)
def test_a_converted_backbone_detects_exactly_what_the_static_one_does(kind, backbone, pages, tmp_path):
    file = classifier_file(backbone, tmp_path)
    static, dynamic = (detector(kind, name, initial_checkpoint=file).eval() for name in (backbone, f"dg_{backbone}"))
    assert graph_stages(dynamic)
    assert not graph_stages(static)
    for one in (static, dynamic):
        (one.roi_heads if kind == "faster_rcnn" else one).score_thresh = 0.0  # random weights find nothing else
    images = [DetectionImages(pages.test, make_transform())[Key(0, 0, k)][0] for k in range(3)]
    images[1] = images[1][:, :70, :90]
    with torch.inference_mode():
        wanted, got = static(images), dynamic(images)
    assert sum(len(one["boxes"]) for one in wanted) > 10
    for one, other in zip(wanted, got, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key])


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_batch_with_and_without_boxes_has_a_loss(kind, pages):
    one = detector(kind).train()
    collate = DetectionCollate(2)
    images = DetectionImages(pages.train._replace(rows=[
        pages.train.rows[0]._replace(labels=np.ones_like(pages.train.rows[0].labels)),
        pages.train.rows[1]._replace(boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64),
                                     crowd=np.zeros(0, bool)),
    ]), make_transform())  # fmt: skip
    both = collate([images[Key(0, 0, 0)], images[Key(0, 0, 1)]])
    empty = collate([images[Key(0, 0, 1)], images[Key(0, 0, 1)]])
    for batch in (both, empty, both.without_weight()):
        one.zero_grad()
        losses = Detection(0)(one, batch, 1)
        (losses.loss * batch.weights).sum().backward()
        assert torch.isfinite(losses.loss).all()
        assert losses.loss.shape == (2,)
        assert losses.loss[0].item() == pytest.approx(sum(v[0].item() for v in losses.shown.values()), rel=1e-5)
        missing = [name for name, p in one.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing  # processes under DDP wait for every gradient


def test_the_loss_depends_on_update_and_seed_alone(pages):
    one = detector().train()
    for module in one.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = DetectionImages(pages.train, make_transform())
    rows_ = [images[Key(0, 0, k)] for k in range(2)]
    for row in rows_:
        row[1]["labels"].clamp_(max=2)
    batch = DetectionCollate(2)(rows_)
    first = Detection(0)(one, batch, 4).loss
    torch.rand(3)
    assert torch.equal(Detection(0)(one, batch, 4).loss, first)
    assert not torch.equal(Detection(1)(one, batch, 4).loss, first)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_050"])
def test_a_trained_static_detector_becomes_dynamic_without_changing_a_detection(backbone, pages, tmp_path):
    file = classifier_file(backbone, tmp_path)
    static = detector("faster_rcnn", backbone, initial_checkpoint=file, seed=3).eval()
    save(static, tmp_path / "static")
    dynamic = detector("faster_rcnn", f"dg_{backbone}", initial_checkpoint=str(tmp_path / "static")).eval()
    assert graph_stages(dynamic)
    for one in (static, dynamic):
        one.roi_heads.score_thresh = 0.0
    images = [DetectionImages(pages.test, make_transform())[Key(0, 0, k)][0] for k in range(2)]
    with torch.inference_mode():
        for one, other in zip(static(images), dynamic(images), strict=True):
            assert len(one["boxes"]) > 5
            assert all(torch.equal(one[key], other[key]) for key in one)
    more = create_detector("faster_rcnn", f"dg_{backbone}", ["a", "b", "c"], [1, 2, 3], SMALL,
                           initial_checkpoint=str(tmp_path / "static"))  # fmt: skip
    for name, value in more.state_dict().items():  # everything is taken over but what the classes decide
        same = name in static.state_dict() and torch.equal(value, static.state_dict()[name])
        assert same or "backbone.body" in name or "box_predictor" in name
    with pytest.raises(ValueError, match="has another backbone"):
        detector("faster_rcnn", "dg_regnetx_002", initial_checkpoint=str(tmp_path / "static"))


def test_a_backbone_needs_no_classifier(tmp_path):
    model = timm.create_model("resnet18", num_classes=0)
    save_file(model.state_dict(), tmp_path / "headless.safetensors")
    body = create_body("dg_resnet18", initial_checkpoint=str(tmp_path / "headless.safetensors"))
    assert torch.equal(body.conv1.weight, model.conv1.weight)


def test_a_saved_backbone_keeps_its_own_options(tmp_path):
    model = timm.create_model("dg_resnet18", num_classes=3, edge_scale=False, block_shortcut=False)
    dg_timm.save_pretrained(model, tmp_path / "backbone")
    one = detector("faster_rcnn", str(tmp_path / "backbone"))
    save(one, tmp_path / "detector")
    assert one.config["backbone_kwargs"] == {"edge_scale": False, "block_shortcut": False}
    assert not next(iter(graph_stages(load_detector(str(tmp_path / "detector"))).values())).edge_scale


@pytest.mark.parametrize("kind", DETECTORS)
def test_in_bfloat16_boxes_are_as_fine_as_ever(kind, pages):
    """Heads run in float32: in bfloat16 a box above 256 px would lie on a grid of 2 px."""
    one = detector(kind, options=SMALL._replace(min_size=(384,), max_size=512)).eval()
    one.backbone.precision = torch.bfloat16
    (one.roi_heads if kind == "faster_rcnn" else one).score_thresh = 0.0
    image = DetectionImages(pages.test, make_transform())[Key(0, 0, 0)][0]
    image = torch.nn.functional.interpolate(image[None], (384, 512))[0]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # as Accelerate wraps it
        found = one([image])[0]
        assert one.backbone.body(image[None])[0].dtype == torch.bfloat16
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    inside = found["boxes"][(found["boxes"] > 256) & (found["boxes"] < 380)]
    assert len(inside) > 5
    assert ((inside % 2) != 0).float().mean() > 0.2


def test_a_compiled_backbone_is_the_same(monkeypatch, pages):
    """Compiled beside the module, not in its place: names, copies and statistics are those of the module."""
    eager = torch.compile(detectors._run, backend="eager")
    monkeypatch.setattr(detectors, "_compiled", lambda: eager)
    one, image = detector().eval(), [DetectionImages(pages.test, make_transform())[Key(0, 0, 0)][0]]
    names = list(one.state_dict())
    with torch.inference_mode():
        wanted = one(image)[0]
        one.backbone.compiled = True
        copy = deepcopy(one)
        for other in (one, copy):
            assert list(other.state_dict()) == names
            assert torch.equal(other(image)[0]["boxes"], wanted["boxes"])
    assert "cost" in detector_statistics(copy, image)


def test_a_backbone_of_one_image_size_is_refused():
    with pytest.raises(ValueError, match="swin_tiny_patch4_window7_224 does not take images of any size"):
        create_body("swin_tiny_patch4_window7_224")
    assert graph_stages(create_body("dg_convnext_atto"))


def test_a_backbone_without_four_levels_is_refused():
    with pytest.raises(
        ValueError, match=r"vit_tiny_patch16_224 has feature maps at the strides 16.*needs 4, 8, 16, 32"
    ):
        create_body("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="test_nothing is no timm or dg_timm model"):
        create_body("test_nothing")
    with pytest.raises(ValueError, match="yolo is no detector; there are faster_rcnn, retinanet, fcos"):
        detector("yolo")


@pytest.mark.parametrize("backbone", ["mobilenetv2_050", "dg_mobilenetv2_050", "regnetx_002", "convnext_atto"])
def test_freezing_the_first_level(backbone):
    """What learns makes the maps from stride 8 on, and nothing else."""
    one = detector(backbone=backbone, options=SMALL).train()
    freeze_backbone(one, 1, norms=False)
    body = one.backbone.body
    maps = dict(zip(body.feature_info.reduction(), body(torch.rand(2, 3, 64, 64)), strict=True))
    assert not maps[4].requires_grad
    for stride in (8, 16, 32):
        assert maps[stride].requires_grad


@pytest.mark.parametrize("levels", range(5))
def test_freezing_levels(levels):
    one = detector(backbone="dg_resnet18")
    freeze_backbone(one, levels, norms=False)
    learning = {name.split(".")[0] for name, p in one.backbone.body.named_parameters() if p.requires_grad}
    stages = [f"layer{k}" for k in range(levels + 1, 5)]
    assert learning == {*stages, *(["conv1", "bn1"] if levels == 0 else [])}


@pytest.mark.parametrize("backbone", ["dg_resnet18", "dg_mobilenetv2_050"])
def test_freezing_norms_spares_those_of_the_graph(backbone):
    """A projection's norm has no statistics yet: frozen, it would be wrong for ever."""
    one = detector(backbone=backbone)
    freeze_backbone(one, 0, norms=True)
    models.set_train_mode(one)
    body = one.backbone.body
    graph = {
        m for s in graph_stages(body).values() for name in s.graph_modules() for m in s.get_submodule(name).modules()
    }
    norms = {module: module in graph for module in body.modules() if isinstance(module, models.NORMS)}
    assert norms
    assert all(module.training == added for module, added in norms.items())
    assert all(p.requires_grad == added for module, added in norms.items() for p in module.parameters())
    assert any(norms.values()) == (backbone == "dg_mobilenetv2_050")


def save(one, folder):
    folder.mkdir()
    save_file(one.state_dict(), folder / "model.safetensors")
    write_detector_config(one, folder)


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_saved_detector_comes_back(kind, tmp_path, pages):
    one = detector(kind, "dg_resnet18", model_kwargs={"edge_scale": False, "block_shortcut": False}).eval()
    save(one, tmp_path / "model")
    back = load_detector(str(tmp_path))
    assert back.config == one.config
    assert not next(iter(graph_stages(back).values())).edge_scale
    image = [DetectionImages(pages.test, make_transform())[Key(0, 0, 0)][0]]
    with torch.inference_mode():
        for key, value in one(image)[0].items():
            assert torch.equal(value, back(image)[0][key])


def test_what_is_no_detector_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_detector(str(tmp_path))
    model = timm.create_model("dg_resnet18", num_classes=2)
    dg_timm.save_pretrained(model, tmp_path / "classifier")
    with pytest.raises(ValueError, match="is a dg_resnet18, no detector"):
        load_detector(str(tmp_path / "classifier"))
    save(detector(), tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"do not fit its config.json, or are damaged"):
        load_detector(str(tmp_path / "damaged"))


@pytest.mark.parametrize("backbone", ["dg_resnet50", "dg_resnet101", "dg_resnext50_32x4d"])
def test_the_papers_cost(backbone):
    """Table 2: GFLOPs at 800 x 1333, two a multiply-add, within 1.5 %."""
    import detection_cost as script

    for name, place in ((backbone.removeprefix("dg_"), 0), (backbone, 1)):
        model = timm.create_model(name, features_only=True, device="meta")
        assert set(STRIDES) <= set(model.feature_info.reduction())
        flops = 2e-9 * dg_timm.analysis.counting(model, (3, 800, 1333)).multiply_adds
        assert flops == pytest.approx(script.TABLE_2[backbone.removeprefix("dg_")][place], rel=0.015)


# --------------------------------------------------------------------------- figures


def perfect(split, shift=0.0):
    return [
        Detections(k, row.boxes[~row.crowd] + shift, np.linspace(1, 0.5, len(row.boxes[~row.crowd]), dtype=np.float32),
                   row.labels[~row.crowd])
        for k, row in enumerate(split.rows)
    ]  # fmt: skip


def test_the_truth_has_an_average_precision_of_100(pages):
    figures = average_precision(perfect(pages.test), pages.test, pages.categories)
    assert figures.overall["AP"] == figures.overall["AP50"] == pytest.approx(100)
    assert "APl" not in figures.overall  # no digit is larger than 96 x 96
    assert sum(one.boxes for one in figures.classes) == pages.test.boxes
    assert all(pytest.approx(100) == one.AP for one in figures.classes)


def reference(found, split, label, threshold):
    """Average precision at 101 recalls, from its definition: no crowds, fewer than 100 boxes an image."""
    outcomes, truths = [], sum(int((row.labels == label).sum()) for row in split.rows)
    for one in found:
        row = split.rows[one.row]
        truth = torch.from_numpy(row.boxes[row.labels == label])
        mine = one.labels == label
        order = np.argsort(-one.scores[mine], kind="stable")
        taken: set[int] = set()
        for box, score in zip(one.boxes[mine][order], one.scores[mine][order], strict=True):
            overlap = box_iou(torch.from_numpy(box)[None], truth)[0] if len(truth) else torch.zeros(0)
            free = [(float(v), k) for k, v in enumerate(overlap) if k not in taken and float(v) >= threshold]
            if free:
                taken.add(max(free)[1])
            outcomes.append((-score, not free))
    wrong = np.array([bad for _, bad in sorted(outcomes, key=lambda pair: pair[0])], dtype=bool)
    right, seen = np.cumsum(~wrong), np.arange(1, len(wrong) + 1)
    precision, recall = right / seen, right / truths
    return 100 * np.mean([max(precision[recall >= r], default=0.0) for r in np.linspace(0, 1, 101)])


def test_average_precision_is_that_of_its_definition(pages):
    """Boxes moved at random, some missing, some invented: figures by class against twenty lines of the definition."""
    random_ = np.random.default_rng(0)
    found = []
    for one in perfect(pages.test):
        kept = random_.random(len(one.boxes)) < 0.8
        boxes = one.boxes[kept] + random_.normal(0, 3, (kept.sum(), 4)).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        boxes = np.concatenate([boxes, random_.uniform(0, 40, (2, 2)).repeat(2, 1)[:, [0, 2, 1, 3]].astype(np.float32)])
        boxes[-2:, 2:] = boxes[-2:, :2] + 20
        labels = np.concatenate([one.labels[kept], random_.integers(1, 11, 2)])
        found.append(Detections(one.row, boxes, random_.random(len(boxes)).astype(np.float32), labels))
    figures = average_precision(found, pages.test, pages.categories)
    for label, one in enumerate(figures.classes, start=1):
        assert pytest.approx(reference(found, pages.test, label, 0.5), abs=1e-4) == one.AP50
        assert pytest.approx(reference(found, pages.test, label, 0.75), abs=1e-4) == one.AP75
    assert figures.overall["AP50"] == pytest.approx(np.mean([one.AP50 for one in figures.classes]), abs=1e-4)
    assert 20 < figures.overall["AP50"] < 95


def test_figures_are_pycocotools_own(tmp_path):
    """Crowds, areas that are not the boxes', ids with gaps: judged by pycocotools from our two JSON files' contents."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    random_ = np.random.default_rng(1)
    annotations_, number = [], 0
    for image in (10, 11, 12):
        for _ in range(12):
            left, top = random_.integers(0, 40), random_.integers(0, 25)
            width, height = random_.integers(4, 20), random_.integers(4, 15)
            number += 1
            annotations_.append({"id": number, "image_id": image, "category_id": int(random_.choice([3, 7])),
                                 "bbox": [int(left), int(top), int(width), int(height)],
                                 "area": float(random_.choice([50.0, 2000.0, 20000.0])),
                                 "iscrowd": int(random_.random() < 0.25)})  # fmt: skip
    splits = load_detection(coco(tmp_path, annotations=annotations_))
    found = []
    for k, row in enumerate(splits.train.rows):
        boxes = np.concatenate([row.boxes + random_.normal(0, 1, row.boxes.shape), row.boxes]).astype(np.float32)
        boxes = np.round(boxes * 8) / 8  # as exact in JSON as here
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = random_.permutation(len(boxes)).astype(np.float32) / 64
        found.append(Detections(k, boxes, scores, np.concatenate([row.labels, row.labels])))
    figures = average_precision(found, splits.train, splits.categories).overall
    truth = COCO(str(tmp_path / "instances_train.json"))
    judge = COCOeval(truth, truth.loadRes(coco_results(found, splits.train, splits.categories)), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert list(figures) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert list(figures.values()) == pytest.approx(list(100 * judge.stats[:6]), abs=1e-3)


def test_pictures_show_the_wiring(pages, tmp_path, monkeypatch):
    """A panel a stage of more than one block, with the weights of that image's edges."""
    from matplotlib.axes import Axes

    shown, own = [], Axes.imshow

    def record(self, data, *args, **kwargs):
        shown.append(data)
        return own(self, data, *args, **kwargs)

    monkeypatch.setattr(Axes, "imshow", record)
    one = detector(backbone="dg_resnet18").eval()
    randomize_graph(one)
    split = pages.test.choose([0, 5])
    found = [one_._replace(labels=np.minimum(one_.labels, 2)) for one_ in perfect(split)]
    file = draw_detections(one, split, found, pages.categories, tmp_path / "pictures.png")
    assert Image.open(io.BytesIO(file.read_bytes())).width > 1000
    alphas = [data for data in shown if isinstance(data, np.ma.MaskedArray)]
    assert len(alphas) == 2 * 4
    assert not np.allclose(alphas[0].filled(0), alphas[4].filled(0))  # two images, two wirings


def test_nothing_found_is_zero_and_nothing_to_find_is_an_error(pages):
    nothing = [Detections(k, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
               for k in range(pages.test.size)]  # fmt: skip
    assert average_precision(nothing, pages.test, pages.categories).overall["AP"] == 0
    with pytest.raises(ValueError, match="there is no image"):
        average_precision([], pages.test, pages.categories)


def test_results_have_cocos_format():
    split = DetectionSplit([Annotated("x7", "p", (9, 9), *([np.zeros(0)] * 4))], "s")
    found = [Detections(0, np.array([[1.0, 2.0, 4.5, 8.0]]), np.array([0.75]), np.array([2]))]
    assert coco_results(found, split, Categories(["a", "b"], [3, 7])) == [
        {"image_id": "x7", "category_id": 7, "bbox": [1.0, 2.0, 3.5, 6.0], "score": 0.75}
    ]


def test_the_share_of_a_process_does_not_change_what_is_found(pages):
    """Batches are cut alike for any number of processes, so padding and rounding are, too."""
    one, small = detector().eval(), pages.test.choose(range(7))
    one.roi_heads.score_thresh = 0.0
    parts = []
    for process, processes in ((0, 1), (0, 2), (1, 2)):
        order = IndexOrder(small.size, 2, Share(process, processes))
        loader = Loader(order, DetectionImages(small, make_transform()), DetectionCollate(2))
        parts.append(detect(one, loader.epoch(0), Accelerator(cpu=True)))
    whole, shared = parts[0], sorted(parts[1] + parts[2], key=lambda found: found.row)
    assert [found.row for found in whole] == [found.row for found in shared] == list(range(7))
    for found, other in zip(whole, shared, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(found[1:], other[1:], strict=True))


# --------------------------------------------------------------------------- runs

TINY = ("--data", "digits", "--model", "dg_test_resnet", "--min-size", 96, "--max-size", 128, "--fpn-channels", 8,
        "--anchor-size", 8, "--roi-batch", 16, "--workers", 0, "--opt", "adamw", "--lr", 1e-3, "--batch-size", 4,
        "--train-limit", 16, "--val-limit", 7, "--log-every", 1)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("detect") / "run"
    process = run("detect.py", *TINY, "--epochs", 2, "--ema-decay", 0.5, "--output", output)
    assert process.returncode == 0, process.stderr
    return output, process


def test_what_a_run_leaves(finished):
    output, process = finished
    table_ = rows(output / "summary.csv")
    assert [row["epoch"] for row in table_] == ["1", "2"]
    assert {"train_loss", "train_loss_box_reg", "eval_AP", "ema_AP50", "cost", "weight.layer1"} <= set(table_[0])
    assert re.search(r"best: AP \(%\) [\d.]+ in epoch", process.stdout)
    assert json.loads((output / "model" / "config.json").read_text())["backbone"] == "dg_test_resnet"
    for result in json.loads((output / "predictions.json").read_text()):
        assert result["image_id"] in range(60)
        assert result["category_id"] in range(10)
    with (output / "per_class.csv").open() as stream:
        assert [row["category"] for row in csv.DictReader(stream)] == list(map(str, range(10)))
    for picture in ("detections.png", "curves.png"):
        assert Image.open(io.BytesIO((output / picture).read_bytes())).width > 300
    assert load_detector(str(output / "checkpoints" / "best" / "ema")).config["detector"] == "faster_rcnn"
    best = max(table_, key=lambda row: max(float(row["eval_AP"]), float(row["ema_AP"])))
    prefix = max(("ema", "eval"), key=lambda prefix: float(best[f"{prefix}_AP"]))
    figures = json.loads((output / "figures.json").read_text())
    assert figures["AP"] == pytest.approx(float(best[f"{prefix}_AP"]))
    again = run("detect.py", "--evaluate", output / "model", *TINY[:2], "--val-limit", 7, "--workers", 0)
    line = json.loads(next(row for row in again.stdout.splitlines() if row.startswith("{")))
    assert figures.items() <= line.items()  # the model, and its predictions, are those of the better network


def test_two_processes_evaluate_to_the_same_figures(finished, tmp_path):
    output, _ = finished
    found = []
    for processes in (1, 2):
        process = run("detect.py", "--evaluate", output / "model", *TINY[:2], "--val-limit", 7, "--workers", 0,
                      "--picture-score", 0, "--pictures", 1, "--val-batch-size", 2, "--output",
                      tmp_path / str(processes), processes=processes)  # fmt: skip
        assert process.returncode == 0, process.stderr
        line = json.loads(next(row for row in process.stdout.splitlines() if row.startswith("{")))
        line.pop("seconds")
        found.append((line, (tmp_path / str(processes) / "predictions.json").read_bytes()))
    assert found[0] == found[1]
    assert found[0][0]["images"] == 7


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """The same images an update, the same regions of them, norms with fixed statistics: weights agree to rounding."""
    networks = []
    for processes, updates in ((1, 4), (2, 4), (1, 1)):
        output = tmp_path / f"{processes}-{updates}"
        process = run("detect.py", *TINY, "--updates", updates, "--micro-batch", 2, "--opt", "sgd", "--lr", 0.01,
                      "--freeze-norm", "--pictures", 0, "--output", output, processes=processes)  # fmt: skip
        assert process.returncode == 0, process.stderr
        networks.append(load_file(output / "checkpoints" / "last" / "model.safetensors"))
    alone, shared, before = networks
    learned = [name for name in alone if alone[name].is_floating_point() and not torch.equal(alone[name], before[name])]
    assert len(learned) > 20

    def distance(one, other):
        return sum(float((one[name] - other[name]).pow(2).sum()) for name in learned) ** 0.5

    assert distance(alone, shared) < 1e-3 * distance(alone, before)


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    untouched, output = tmp_path / "untouched", tmp_path / "killed"
    finish(untouched, 1, "detect.py")
    process = start(output, 1, script="detect.py")
    assert "killed" in kill(process, "all", output, random.Random(0))
    finish(output, 1, "detect.py")
    assert state(output, 1) == state(untouched, 1)
    assert rows(output / "summary.csv")[-1]["eval_AP"] == rows(untouched / "summary.csv")[-1]["eval_AP"]


@pytest.mark.parametrize(
    ("options", "error"),
    [(("--data", "nowhere/at/all"), "nowhere/at/all"),
     (("--model", "vit_tiny_patch16_224"), "needs 4, 8, 16, 32"),
     (("--model", "dg_resnet81"), "do you mean"),
     (("--batch-size", 400), "--batch-size 400 is more than the 16 images"),
     (("--batch-size", 8, "--micro-batch", 3), "--micro-batch 3 does not divide"),
     (("--val-split", "spring"), "--val-split spring: digits has no such split"),
     (("--layer-decay", 0.7), "--layer-decay is for classifiers"),
     (("--warmup-updates", 3), "belong to --updates"),
     (("--updates", 30, "--warmup-epochs", 1), "--warmup-epochs: counted in epochs"),
     (("--initial-checkpoint", "missing.safetensors"), "missing.safetensors"),
     (("--detector", "fcos"), "fcos needs 64, 96, 128"),
     (("--evaluate", "missing"), "missing has no config.json")],
)  # fmt: skip
def test_bad_options_are_refused_before_anything_is_written(options, error, tmp_path, monkeypatch, capsys):
    import detect as script

    monkeypatch.setattr(
        "sys.argv", ["detect.py", *map(str, TINY), *map(str, options), "--output", str(tmp_path / "run")]
    )
    assert script.main() == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_evaluation_replaces_nothing(finished, tmp_path):
    output, _ = finished
    before = {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
    for target in (("--evaluate", output / "model", "--output", output), ("--output", output)):
        process = run("detect.py", *TINY, *target, "--pictures", 0)
        assert process.returncode == 2
        assert "holds a run already (args.yaml)" in process.stderr
    assert before == {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
    (tmp_path / "predictions.json").write_text("mine")
    process = run("detect.py", *TINY, "--output", tmp_path)
    assert process.returncode == 2
    assert (tmp_path / "predictions.json").read_text() == "mine"


def test_an_evaluation_that_is_stopped_says_so(finished, capsys, tmp_path):
    import detect as script

    args = script.parse(["--evaluate", str(finished[0] / "model"), "--val-limit", "3", "--workers", "0",
                         "--output", str(tmp_path / "out")])  # fmt: skip
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    with pytest.raises(SystemExit) as stopped:
        script.evaluate_saved(args, Accelerator(cpu=True), stop)
    assert stopped.value.code == 128 + 15
    assert "stopped before all images were seen" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


WAYS = [
    ("--mixed-precision", "bf16", "--channels-last"),
    ("--detector", "fcos", "--fpn-channels", 64, "--grad-checkpointing"),
    pytest.param(("--compile", "--ema-decay", 0.5), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", WAYS)
def test_other_ways_to_run(options, tmp_path):
    process = run("detect.py", *TINY, "--epochs", 1, *options, "--output", tmp_path / "run", timeout=900)
    assert process.returncode == 0, process.stderr
    assert math.isfinite(float(rows(tmp_path / "run" / "summary.csv")[0]["train_loss"]))
    execution = ("--execution", "sparse") if "--mixed-precision" in options else ()
    process = run("detect.py", "--evaluate", tmp_path / "run", *TINY[:2], "--val-limit", 3, "--workers", 0, *execution)
    assert process.returncode == 0, process.stderr


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    folder = Path(coco(tmp_path / "data"))
    (folder / "images" / "2.png").write_bytes(b"no image")
    options = [*TINY[2:], "--data", folder, "--epochs", 1, "--batch-size", 1, "--train-limit", 3, "--pictures", 1]
    process = run("detect.py", *options, "--output", tmp_path / "stopped")
    assert process.returncode == 2
    assert "--on-bad-image skip leaves it out" in process.stderr
    process = run("detect.py", *options, "--on-bad-image", "skip", "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    row = rows(tmp_path / "run" / "summary.csv")[0]
    assert (row["skipped_images"], row["eval_skipped_images"]) == ("1", "1")


def test_a_split_of_crowds_has_nothing_to_find(tmp_path, capsys, monkeypatch):
    import detect as script

    folder = Path(coco(tmp_path / "data"))
    whole = json.loads((folder / "instances_val.json").read_text())
    whole["annotations"] = [one for one in whole["annotations"] if one["iscrowd"]]
    (folder / "instances_val.json").write_text(json.dumps(whole))
    options = ["--data", str(folder), "--batch-size", "1", "--output", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["detect.py", *options])
    assert script.main() == 2
    assert re.search("instances_val.json .*has no box to find", capsys.readouterr().err)


def test_what_is_not_installed_is_named_at_the_start(monkeypatch, capsys, tmp_path):
    import detect as script

    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pycocotools" else found(name))
    monkeypatch.setattr("sys.argv", ["detect.py", *map(str, TINY), "--output", str(tmp_path / "run")])
    assert script.main() == 2
    assert "pycocotools is not installed: pip install 'dg-timm[detect]'" in capsys.readouterr().err


def test_what_is_only_shown_may_change_in_a_resumed_run():
    import detect as script

    from dg_timm.training.run.arguments import differences

    then, now = script.parse(["--pictures", "4"]), script.parse(["--pictures", "0", "--picture-score", "0.1"])
    assert differences(vars(now), vars(then)) == []


@pytest.mark.parametrize("option", [("--detector", "yolo"), ("--anchor-size", "6"), ("--freeze-levels", "5"),
                                    ("--hflip", "2"), ("--recipe", "nothing")])  # fmt: skip
def test_options_out_of_range_are_refused(option, capsys):
    import detect as script

    with pytest.raises(SystemExit):
        script.parse(list(option))
    assert option[1] in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "dg_timm/recipes/detection").glob("*.yaml")))
def test_recipes_are_valid(recipe):
    import detect as script

    args = script.parse(["--recipe", recipe.stem])
    assert args.recipe == recipe.stem
    assert timm.is_model(args.model)


def test_a_run_may_be_counted_in_updates(tmp_path):
    process = run("detect.py", *TINY, "--updates", 6, "--sched", "multistep", "--milestone-updates", 4,
                  "--decay-rate", 0.1, "--warmup-updates", 2, "--warmup-lr", 1e-4, "--pictures", 0,
                  "--output", tmp_path / "run")  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "schedule is off" not in process.stdout
    table_ = rows(tmp_path / "run" / "updates.csv")
    assert [int(row["update"]) for row in table_] == [1, 2, 3, 4, 5, 6]  # an epoch has 4
    assert [float(row["lr"]) for row in table_] == pytest.approx([1e-4, 5.5e-4, 1e-3, 1e-4, 1e-4, 1e-4])
    assert rows(tmp_path / "run" / "summary.csv")[-1]["updates"] == "6"


def test_a_dry_run_writes_nothing(tmp_path):
    process = run("detect.py", *TINY, "--dry-run", "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert re.search(r"faster_rcnn over dg_test_resnet: .* 4 graphs", process.stdout)
    assert "4 images an update = 4 at a time" in process.stdout
    assert not (tmp_path / "run").exists()


def test_the_short_options_of_the_kill_test_are_valid():
    import detect as script

    assert script.parse(shlex.split(DETECT)).photometric == 0.5
