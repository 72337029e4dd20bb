"""Images and boxes through decoding, augmentation and batching."""

import re

import numpy as np
import torch
from PIL import Image

from dg_timm.detection.data.annotations import load_detection
from dg_timm.detection.data.loading import Augmentation, DetectionCollate, DetectionImages, make_transform
from dg_timm.training.data.samplers import SampleKey
from tests.helpers.detection import write_coco


def test_boxes_move_with_their_digits(pages):
    """A flipped page has its boxes where its ink is: what a box holds is the flip of what it held."""
    still = DetectionImages(pages.train, make_transform())[SampleKey(0, 0, 3)]
    turned = DetectionImages(pages.train, make_transform(Augmentation(hflip=1.0)), seed=0)[SampleKey(0, 0, 3)]
    image, target, _ = still
    flipped, moved, _ = turned
    assert torch.equal(flipped, image.flip(2))
    for (a, b, c, d), (e, f, g, h) in zip(target["boxes"].int().tolist(), moved["boxes"].int().tolist(), strict=True):
        assert torch.equal(image[:, b:d, a:c].flip(2), flipped[:, f:h, e:g])


def test_augmentation_is_that_of_the_row_and_epoch(pages):
    transform = make_transform(Augmentation(photometric=1.0, crop=1.0, zoom_out=0.5))
    images = DetectionImages(pages.train, transform, seed=1)
    for key in (SampleKey(0, 0, 0), SampleKey(1, 0, 0), SampleKey(0, 0, 5)):
        first, boxes, _ = images[key]
        torch.rand(7)
        again, same, _ = images[key]
        assert torch.equal(first, again)
        assert torch.equal(boxes["boxes"], same["boxes"])
        assert (boxes["boxes"][:, 2:] > boxes["boxes"][:, :2]).all()
        height, width = first.shape[1:]
        assert (boxes["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert len(boxes["boxes"]) == len(boxes["labels"])
    assert images[SampleKey(0, 0, 0)][0].shape != images[SampleKey(1, 0, 0)][0].shape or not torch.equal(
        images[SampleKey(0, 0, 0)][0], images[SampleKey(1, 0, 0)][0]
    )


def test_crowds_are_not_learned(tmp_path):
    splits = load_detection(write_coco(tmp_path))
    _, target, _ = DetectionImages(splits.train, make_transform())[SampleKey(0, 0, 1)]
    assert target["boxes"].shape == (0, 4)


def test_an_image_of_another_size_or_turned(tmp_path):
    splits = load_detection(write_coco(tmp_path))
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / "images" / "0.png")
    fault = DetectionImages(splits.train, make_transform())[SampleKey(0, 0, 0)]
    assert re.search(r"image 10 .* is 60 x 50, and its annotation says 60 x 40", fault)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(tmp_path / "images" / "1.png", exif=exif)
    image, _, _ = DetectionImages(splits.train, make_transform())[SampleKey(0, 0, 1)]
    assert image.shape == (3, 40, 60)
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    assert "image 12" in DetectionImages(splits.train, make_transform())[SampleKey(0, 0, 2)].where


def test_a_short_batch_is_filled_up(pages):
    images = DetectionImages(pages.train, make_transform())
    batch = DetectionCollate(4)([images[SampleKey(0, 0, k)] for k in range(3)])
    assert batch.sample_mask.tolist() == [1, 1, 1, 0]
    assert len(batch.images) == len(batch.targets) == 4
    assert batch.rows.tolist() == [[0, 0], [0, 1], [0, 2], [0, 0]]
    assert DetectionCollate(2)([]).sample_mask.tolist() == [0, 0]
