"""COCO's average precision, the same under any number of processes.

Each process keeps the detections of its images; they are gathered once, put in the order of the data set, and judged by
pycocotools through torchmetrics in the main process. Batches are filled up to one size and cut alike for any number of
processes, so that an image's detections don't depend on who shared its batch.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from dg_timm.detection.data.boxes import Categories, DetectionSplit
from dg_timm.detection.data.loading import DetectionBatch
from dg_timm.training.run.report import Metric

AP = Metric("AP", "AP (%)")
# COCO's twelve numbers that papers print, by the names of torchmetrics
NAMES = {"AP": "map", "AP50": "map_50", "AP75": "map_75", "APs": "map_small", "APm": "map_medium", "APl": "map_large"}


class Detections(NamedTuple):
    """Of one image: boxes (n, 4), [left, top, right, bottom] in pixels; scores (n,), 0..1; labels (n,), from 1 on."""

    row: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class ClassFigures(NamedTuple):
    """Of one category, in percent; nan where the split has no box of it."""

    name: str
    boxes: int
    AP: float
    AP50: float
    AP75: float


class Precision(NamedTuple):
    """COCO's average precision in percent: ``overall`` by the names of ``NAMES``.

    A size of which there is no box is left out; AP is nan where there is no box at all.
    """

    overall: dict[str, float]
    classes: list[ClassFigures]


@torch.inference_mode()
def detect(
    detector: nn.Module,
    batches: Iterable[DetectionBatch],
    accelerator: Accelerator,
    stop: Callable[[], bool] = lambda: False,
) -> list[Detections]:
    """Detections of all images of all processes, in the order of the split; in the main process (others: empty).

    Args:
        batches: of this process.
        stop: once it is true, the rest is left out.
    """
    training = detector.training
    detector.eval()
    kept: list[Detections] = []
    for batch in batches:
        if stop():
            break
        batch = batch.on(accelerator.device, torch.contiguous_format)
        with accelerator.autocast() if accelerator.mixed_precision != "no" else nullcontext():
            found = detector(batch.images)
        for weight, (_, row), one in zip(batch.weights.tolist(), batch.rows.tolist(), found, strict=True):
            if weight > 0:
                boxes, scores = (one[key].float().cpu().numpy() for key in ("boxes", "scores"))
                kept.append(Detections(row, boxes, scores, one["labels"].cpu().numpy()))
    detector.train(training)
    everything = gather_object(kept) if accelerator.num_processes > 1 else kept
    return sorted(everything, key=lambda one: one.row) if accelerator.is_main_process else []


def evaluate_detector(
    detector: nn.Module,
    batches: Iterable[DetectionBatch],
    split: DetectionSplit,
    categories: Categories,
    accelerator: Accelerator,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Precision, list[Detections]]:
    """(figures, the same in every process; detections, in the main process)."""
    found = detect(detector, batches, accelerator, stop)
    shared: list[Optional[Precision]] = [None]
    failure: Optional[BaseException] = None
    if accelerator.is_main_process and not stop():
        try:
            shared[0] = average_precision(found, split, categories)
        except Exception as error:  # the others wait for an answer
            failure = error
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    if failure is not None:
        raise failure
    nothing = Precision({name: float("nan") for name in NAMES}, [])  # of an evaluation that was stopped
    return shared[0] or nothing, found


def average_precision(found: list[Detections], split: DetectionSplit, categories: Categories) -> Precision:
    """COCO's figures of detections over the images that they name (of which nothing may have been found).

    Raises:
        ValueError: if there is no image to judge.
        ImportError: naming the extra, without torchmetrics or pycocotools.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError as error:
        raise ImportError(
            "average precision needs torchmetrics and pycocotools: pip install 'dg-timm[detect]'"
        ) from error
    if not found:
        raise ValueError(f"there is no image of {split.name} to evaluate on (that can be read)")
    metric = MeanAveragePrecision(
        box_format="xyxy", iou_type="bbox", extended_summary=True, backend="pycocotools", sync_on_compute=False
    )
    truth = [split.rows[one.row] for one in found]
    metric.update(
        [{"boxes": _tensor(one.boxes), "scores": _tensor(one.scores), "labels": _tensor(one.labels)} for one in found],
        [
            {
                "boxes": _tensor(row.boxes),
                "labels": _tensor(row.labels),
                "iscrowd": _tensor(row.crowd.astype(np.int64)),
                "area": _tensor(row.area),
            }
            for row in truth
        ],
    )
    result = metric.compute()
    overall = {name: 100 * float(result[key]) for name, key in NAMES.items() if float(result[key]) >= 0}
    overall.setdefault("AP", float("nan"))  # no box to find
    # (thresholds of overlap, recalls, classes, sizes, most detections), -1 where there is no box
    precision = result["precision"][:, :, :, 0, -1]
    labels = [int(label) for label in result["classes"].reshape(-1)]
    counts = np.bincount(np.concatenate([row.labels[~row.crowd] for row in truth]), minlength=len(categories.names) + 1)
    classes = []
    for label, name in enumerate(categories.names, start=1):
        curves = precision[:, :, labels.index(label)] if label in labels else torch.full((10, 1), -1.0)
        figures = [float("nan") if (part < 0).all() else 100 * float(part[part >= 0].mean())
                   for part in (curves, curves[0], curves[5])]  # fmt: skip
        classes.append(ClassFigures(name, int(counts[label]), *figures))
    return Precision(overall, classes)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def coco_results(found: list[Detections], split: DetectionSplit, categories: Categories) -> list[dict[str, Any]]:
    """Detections in COCO's format of results, best first within an image; sizes in pixels."""
    rows = []
    for one in found:
        for box, score, label in zip(one.boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True):
            left, top, right, bottom = box
            rows.append(
                {
                    "image_id": split.rows[one.row].image_id,
                    "category_id": categories.ids[label - 1],
                    "bbox": [round(value, 3) for value in (left, top, right - left, bottom - top)],
                    "score": round(score, 6),
                }
            )
    return rows
