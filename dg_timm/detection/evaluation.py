"""Evaluate a detector by COCO's average precision, exactly, whatever the number of processes.

Each process keeps the detections of its images; they are gathered once, put in the order of the data set, and judged by
pycocotools through torchmetrics in the main process. Batches are filled up to one size and cut alike for any number of
processes, so that an image's detections don't depend on who shared its batch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from dg_timm._errors import BadValue, MissingPackage
from dg_timm._modes import evaluating
from dg_timm.analysis.counting import Costs, recorded_cost
from dg_timm.analysis.recorder import recording
from dg_timm.detection.data.boxes import Categories, DetectionSplit, ImageAnnotations
from dg_timm.detection.data.loading import DetectionBatch
from dg_timm.training.loop.report import Metric

AP = Metric("AP", "AP (%)")
# COCO's numbers that papers print, each with its name in torchmetrics
METRICS = {"AP": "map", "AP50": "map_50", "AP75": "map_75", "APs": "map_small", "APm": "map_medium", "APl": "map_large"}
_IOU_THRESHOLDS = 10  # 0.5, 0.55, ..., 0.95
_AT_50, _AT_75 = 0, 5  # their places among the thresholds


class Detections(NamedTuple):
    """What was found in one image.

    Attributes:
        row: the row of the image in its split.
        boxes: (n, 4) float32, [left, top, right, bottom] in pixels.
        scores: (n,) float32, 0..1.
        labels: (n,) int64, from 1 on.
        cost: of the backbone, relative to the static one; None where it was not counted.
    """

    row: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    cost: float | None = None


class ClassAP(NamedTuple):
    """The average precision of one class in percent; nan where the split has no box of it.

    Attributes:
        name: the name of the class.
        boxes: how many boxes there are to find.
        AP: the mean over overlaps (intersection over union) from 0.5 to 0.95.
        AP50, AP75: those at overlaps of 0.5 and 0.75.
    """

    name: str
    boxes: int
    AP: float
    AP50: float
    AP75: float


class APResult(NamedTuple):
    """COCO's average precision in percent.

    Attributes:
        overall: by the names of ``METRICS``. A size of which there is no box is left out; AP is nan where there is no
            box at all. After :func:`evaluate_detector` also ``cost`` and ``spread``, if costs were counted.
        classes: one entry for each class.
    """

    overall: dict[str, float]
    classes: list[ClassAP]


@torch.inference_mode()
def collect_detections(
    detector: Any,
    batches: Iterable[DetectionBatch],
    accelerator: Accelerator,
    stop: Callable[[], bool] = lambda: False,
    costs: Costs | None = None,
) -> list[Detections]:
    """Run a detector and gather what it finds.

    Args:
        detector: not wrapped for distributed training. Its modules run in eval mode, and get their own modes back, also
            after an exception.
        batches: those of this process.
        stop: if ``stop()`` becomes true, the rest is left out.
        costs: of its backbone (:func:`dg_timm.analysis.counting.count_costs`), a dynamic one in dense execution;
            without them none are added up.

    Returns:
        In the main process, the detections of all images of all processes, in the order of the split; in the others
        nothing.
    """
    kept: list[Detections] = []
    body: Any = detector.backbone.body if costs is not None else None
    with evaluating(detector):
        for batch in batches:
            if stop():
                break
            batch = batch.move_to(accelerator.device, torch.contiguous_format)
            precision = accelerator.autocast() if accelerator.mixed_precision != "no" else nullcontext()
            with precision, recording(body) if costs is not None else nullcontext() as recorder:
                found = detector(batch.images)
            of_images: list[float | None] = [None] * len(found)
            if costs is not None and recorder is not None:
                of_images = recorded_cost(body, recorder, costs).tolist()
            counted = zip(batch.sample_mask.tolist(), batch.rows.tolist(), found, of_images, strict=True)
            for counts, (_, row), one, cost in counted:
                if counts:
                    boxes, scores = (one[key].float().cpu().numpy() for key in ("boxes", "scores"))
                    kept.append(Detections(row, boxes, scores, one["labels"].cpu().numpy(), cost))
    everything = gather_object(kept) if accelerator.num_processes > 1 else kept
    return sorted(everything, key=lambda one: one.row) if accelerator.is_main_process else []


def evaluate_detector(
    detector: nn.Module,
    batches: Iterable[DetectionBatch],
    split: DetectionSplit,
    categories: Categories,
    accelerator: Accelerator,
    stop: Callable[[], bool] = lambda: False,
    costs: Costs | None = None,
) -> tuple[APResult, list[Detections]]:
    """Run a detector over a split and judge what it finds.

    Args:
        detector, batches, stop, costs: as in :func:`collect_detections`.
        split: the images and the truth.
        categories: the classes.

    Returns:
        The result, which every process gets (nan if it was stopped), and in the main process the detections.

    Raises:
        BadValue: there is no image to judge.
        MissingPackage: torchmetrics or pycocotools is not installed.
    """
    found = collect_detections(detector, batches, accelerator, stop, costs)
    shared: list[APResult | None] = [None]
    failure: Exception | None = None
    if accelerator.is_main_process and not stop():
        try:
            result = average_precision(found, split, categories)
            shared[0] = result._replace(overall={**result.overall, **_cost_figures(found)})
        except Exception as error:  # raised below: the other processes wait for the broadcast
            failure = error
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    if failure is not None:
        raise failure
    names = [*METRICS, *(["cost", "spread"] if costs is not None else [])]
    stopped = APResult(dict.fromkeys(names, math.nan), [])
    return shared[0] or stopped, found


def _cost_figures(found: Sequence[Detections]) -> dict[str, float]:
    """The mean cost of the images, and its spread between them; nothing where it was not counted."""
    of_images = [one.cost for one in found if one.cost is not None]
    return {"cost": float(np.mean(of_images)), "spread": float(np.std(of_images))} if of_images else {}


def average_precision(found: Sequence[Detections], split: DetectionSplit, categories: Categories) -> APResult:
    """Judge detections over the images that they name; in some of these nothing may have been found.

    Raises:
        BadValue: ``found`` is empty: there is no image to judge.
        MissingPackage: torchmetrics or pycocotools is not installed.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError as error:
        raise MissingPackage(
            "average precision needs torchmetrics and pycocotools: pip install 'dg-timm[detect]'"
        ) from error
    if not found:
        raise BadValue(f"{split.name} has no image to evaluate on (that can be read)")
    metric = MeanAveragePrecision(
        box_format="xyxy", iou_type="bbox", extended_summary=True, backend="pycocotools", sync_on_compute=False
    )
    truth = [split.rows[one.row] for one in found]
    metric.update([_prediction(one) for one in found], [_target(row) for row in truth])
    result = metric.compute()
    overall = {name: 100 * float(result[key]) for name, key in METRICS.items() if float(result[key]) >= 0}
    overall.setdefault("AP", float("nan"))  # torchmetrics says -1 where there is no box to find
    # (overlaps, recalls, classes), over all sizes and the most detections; -1 where there is no box
    precision = result["precision"][:, :, :, 0, -1]
    labels = [int(label) for label in result["classes"].reshape(-1)]
    counts = np.bincount(np.concatenate([row.labels[~row.crowd] for row in truth]), minlength=len(categories.names) + 1)
    classes = []
    for label, name in enumerate(categories.names, start=1):
        curves = precision[:, :, labels.index(label)] if label in labels else torch.full((_IOU_THRESHOLDS, 1), -1.0)
        values = [_mean_percent(part) for part in (curves, curves[_AT_50], curves[_AT_75])]
        classes.append(ClassAP(name, int(counts[label]), *values))
    return APResult(overall, classes)


def _prediction(found: Detections) -> dict[str, Tensor]:
    return {key: _tensor(getattr(found, key)) for key in ("boxes", "scores", "labels")}


def _target(row: ImageAnnotations) -> dict[str, Tensor]:
    return {
        "boxes": _tensor(row.boxes),
        "labels": _tensor(row.labels),
        "iscrowd": _tensor(row.crowd.astype(np.int64)),
        "area": _tensor(row.area),
    }


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _mean_percent(precision: Tensor) -> float:
    known = precision[precision >= 0]
    return 100 * float(known.mean()) if len(known) else float("nan")


def coco_results(found: Sequence[Detections], split: DetectionSplit, categories: Categories) -> list[dict[str, Any]]:
    """Convert detections to COCO's format of results: ``bbox`` is [left, top, width, height] in pixels."""
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
