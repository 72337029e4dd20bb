"""Small detection data sets and detectors for tests."""

import json
from pathlib import Path

import numpy as np
import timm
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import save_file

from dg_timm.detection.data.loading import DetectionImages, make_transform
from dg_timm.detection.detectors import DetectorConfig, create_detector
from dg_timm.detection.evaluation import Detections
from dg_timm.training.data.samplers import SampleKey

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"
SMALL = DetectorConfig(min_size=(96,), max_size=128, fpn_channels=64, anchor_size=8, roi_batch=16)
NAMES = ["a", "b"]
TINY = ("--data", "digits", "--model", "dg_test_resnet", "--min-size", 96, "--max-size", 128, "--fpn-channels", 8,
        "--anchor-size", 8, "--roi-batch", 16, "--workers", 0, "--opt", "adamw", "--lr", 1e-3, "--batch-size", 4,
        "--train-limit", 16, "--val-limit", 7, "--log-every", 1)  # fmt: skip


def make_detector(kind="faster_rcnn", backbone="dg_test_resnet", options=SMALL, **others):
    return create_detector(kind, backbone, NAMES, [3, 7], options, **others)


def write_coco(folder: Path, **changed):
    """A COCO data set of three images, one of them without boxes; ``changed`` replaces parts of the training file.

    The same images under other names are those to evaluate on.
    """
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        image = Image.fromarray(np.full((40, 60, 3), 40 * number, dtype=np.uint8))
        for name in (f"{number}.png", f"val{number}.png"):
            image.save(folder / "images" / name)
    images = [{"id": 10 + k, "file_name": f"{k}.png", "width": 60, "height": 40} for k in range(3)]
    boxes = [
        {"id": 1, "image_id": 10, "category_id": 3, "bbox": [1, 2, 10, 20], "area": 150.0, "iscrowd": 0},
        {"id": 2, "image_id": 10, "category_id": 7, "bbox": [30, 0, 30, 40.4], "area": 1200, "iscrowd": 0},
        {"id": 3, "image_id": 11, "category_id": 7, "bbox": [0, 0, 60, 40], "area": 2400, "iscrowd": 1},
    ]
    whole = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]}
    held_out = {**whole, "images": [{**image, "file_name": f"val{image['file_name']}"} for image in images]}
    (folder / "instances_val.json").write_text(json.dumps(held_out), encoding="utf-8")
    (folder / "instances_train.json").write_text(json.dumps({**whole, **changed}), encoding="utf-8")
    return str(folder)


def with_box(box, **others):
    return [{"id": 5, "image_id": 10, "category_id": 3, "bbox": box, **others},
            {"id": 6, "image_id": 11, "category_id": 3, "bbox": [0, 0, 5, 5]}]  # fmt: skip


def make_table(boxes, categories, names=("a", "b"), as_columns=False, **columns):
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


def save_classifier(name, folder):
    """Weights of a static classifier whose norm statistics are not trivial, as those of a trained one are."""
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    save_file(model.state_dict(), folder / "model.safetensors")
    return str(folder / "model.safetensors")


def perfect_detections(split, shift=0.0):
    return [
        Detections(k, row.boxes[~row.crowd] + shift, np.linspace(1, 0.5, len(row.boxes[~row.crowd]), dtype=np.float32),
                   row.labels[~row.crowd])
        for k, row in enumerate(split.rows)
    ]  # fmt: skip


def images_of(split, count):
    """The first images of a split, (3, height, width) in 0..1 each."""
    images = DetectionImages(split, make_transform())
    return [images[SampleKey(0, 0, k)][0] for k in range(count)]
