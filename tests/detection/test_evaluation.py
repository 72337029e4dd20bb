"""Average precision: that of its definition, of pycocotools, and under any number of processes."""

import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torchvision.ops import box_iou

from dg_timm._errors import BadValue, MissingPackage
from dg_timm.detection.data.annotations import load_detection
from dg_timm.detection.data.boxes import Categories, DetectionSplit, ImageAnnotations
from dg_timm.detection.data.loading import DetectionCollate, DetectionImages, make_transform
from dg_timm.detection.evaluation import (
    Detections,
    average_precision,
    coco_results,
    collect_detections,
    evaluate_detector,
)
from dg_timm.training.data.loader import Loader
from dg_timm.training.data.samplers import MapSampler, Rank
from tests.helpers.detection import make_detector, perfect_detections, write_coco


def test_the_truth_has_an_average_precision_of_100(pages):
    figures = average_precision(perfect_detections(pages.test), pages.test, pages.categories)
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
    for one in perfect_detections(pages.test):
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
    splits = load_detection(write_coco(tmp_path, annotations=annotations_))
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


def test_nothing_found_is_zero_and_nothing_to_find_is_an_error(pages):
    nothing = [Detections(k, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
               for k in range(pages.test.size)]  # fmt: skip
    assert average_precision(nothing, pages.test, pages.categories).overall["AP"] == 0
    with pytest.raises(BadValue, match="has no image to evaluate on"):
        average_precision([], pages.test, pages.categories)


def test_results_have_cocos_format():
    split = DetectionSplit([ImageAnnotations("x7", "p", (9, 9), *([np.zeros(0)] * 4))], "s")
    found = [Detections(0, np.array([[1.0, 2.0, 4.5, 8.0]]), np.array([0.75]), np.array([2]))]
    assert coco_results(found, split, Categories(["a", "b"], [3, 7])) == [
        {"image_id": "x7", "category_id": 7, "bbox": [1.0, 2.0, 3.5, 6.0], "score": 0.75}
    ]


def test_the_share_of_a_process_does_not_change_what_is_found(pages):
    """Batches are cut alike for any number of processes, so padding and rounding are, too."""
    one, small = make_detector().eval(), pages.test.select(range(7))
    one.roi_heads.score_thresh = 0.0
    parts = []
    for process, processes in ((0, 1), (0, 2), (1, 2)):
        order = MapSampler(small.size, 2, Rank(process, processes))
        loader = Loader(order, DetectionImages(small, make_transform()), DetectionCollate(2))
        parts.append(collect_detections(one, loader.epoch(0), Accelerator(cpu=True)))
    whole, shared = parts[0], sorted(parts[1] + parts[2], key=lambda found: found.row)
    assert [found.row for found in whole] == [found.row for found in shared] == list(range(7))
    for found, other in zip(whole, shared, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(found[1:], other[1:], strict=True))


def test_an_unreadable_image_leaves_the_modes_as_they_were(tmp_path):
    """Its error ends the evaluation, and a training that goes on must not go on in eval mode."""
    folder = write_coco(tmp_path)
    (tmp_path / "images" / "val1.png").write_bytes(b"no image")
    test = load_detection(folder).test
    detector = make_detector().train()
    detector.backbone.fpn.eval()  # a part may have a mode of its own
    modes = [module.training for module in detector.modules()]
    loader = Loader(MapSampler(3, 1), DetectionImages(test, make_transform()), DetectionCollate(1))
    with pytest.raises(BadValue, match=r"image 11 of instances_val\.json"):
        collect_detections(detector, loader.epoch(0), Accelerator(cpu=True))
    assert [module.training for module in detector.modules()] == modes


def test_a_stopped_evaluation_keeps_what_it_saw(pages):
    detector, few = make_detector().eval(), pages.test.select(range(4))
    loader = Loader(MapSampler(4, 1), DetectionImages(few, make_transform()), DetectionCollate(1))
    asked = iter([False, False, True, True])
    result, found = evaluate_detector(
        detector, loader.epoch(0), few, pages.categories, Accelerator(cpu=True), lambda: next(asked)
    )
    assert [one.row for one in found] == [0, 1]
    assert all(np.isnan(value) for value in result.overall.values())
    assert result.classes == []


def test_a_missing_package_is_named_with_its_extra(monkeypatch, pages):
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", None)
    with pytest.raises(MissingPackage, match=r"pip install 'dg-timm\[detect\]'"):
        average_precision(perfect_detections(pages.test), pages.test, pages.categories)


def test_a_class_without_a_box_has_no_precision(pages):
    split = pages.test.select(range(2))
    categories = Categories([*pages.categories.names, "unseen"], [*pages.categories.ids, 10])
    result = average_precision(perfect_detections(split), split, categories)
    assert result.overall["AP"] == pytest.approx(100)
    assert result.classes[-1].boxes == 0
    assert np.isnan(result.classes[-1].AP)
