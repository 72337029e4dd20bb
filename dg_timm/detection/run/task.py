"""The training of a detector, as a task of :mod:`dg_timm.training.run.lifecycle`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from dg_timm._errors import BadValue
from dg_timm.detection.evaluation import AP, APResult, Detections, evaluate_detector
from dg_timm.detection.objective import DetectionObjective
from dg_timm.detection.observation import detector_statistics
from dg_timm.detection.run.build import build_detector, check_extras, load_data, make_detection_loader, make_eval_loader
from dg_timm.detection.run.results import write_results
from dg_timm.detection.saving import save_detector, write_detector_config
from dg_timm.graph.stage import graph_stages
from dg_timm.training.loop.objective import CostTarget
from dg_timm.training.loop.optimization import BatchSplit
from dg_timm.training.loop.report import Row
from dg_timm.training.run.targets import Aim, conclude, describe_gates, evaluate_targets, value_of, with_cost_target
from dg_timm.training.run.task import TrainingTask

_GRAPH_IMAGES = 8  # over which the statistics of the graph are averaged after every epoch


def build_detection_task(args: argparse.Namespace, accelerator: Accelerator, split: BatchSplit) -> TrainingTask:
    """Load the data and build the detector and all that its training needs; nothing is written.

    Raises:
        MissingPackage: what evaluates or draws is not installed.
        BadValue: data, detector or options can't be used.
    """
    check_extras(args)
    splits = load_data(args, accelerator)
    if args.layer_decay is not None:
        raise BadValue("--layer-decay is for classifiers: a feature extractor does not tell its layers")
    set_seed(args.seed)
    detector = build_detector(args, splits.categories, accelerator)
    loader = make_detection_loader(splits.train, args, split.micro_batch, accelerator, training=True)
    val_loader = make_eval_loader(splits.test, args, accelerator)
    observes = accelerator.is_main_process and graph_stages(detector)
    rows = val_loader.sample_rows(_GRAPH_IMAGES) if observes else []
    sample = [row[0].to(accelerator.device) for row in rows]
    updates_per_epoch = splits.train.size // split.images
    objective, aim = _make_objective(args, detector, updates_per_epoch, accelerator)
    costs = objective.expected.costs if isinstance(objective, CostTarget) else None
    found: dict[nn.Module, tuple[APResult, list[Detections]]] = {}  # of the last evaluation, by network

    def evaluate(candidate: nn.Module, stopping: Callable[[], bool]) -> Row:
        def judge() -> Row:
            found[candidate] = evaluate_detector(
                candidate, val_loader.epoch(0), splits.test, splits.categories, accelerator, stopping, costs
            )
            return dict(found[candidate][0].overall)

        return judge() if aim is None else evaluate_targets(aim, AP, judge)

    def export(best: nn.Module, row: Row, epochs: int, average: bool) -> None:
        save_detector(best, Path(args.output) / "model")
        result, detections = found[best]
        write_results(
            Path(args.output),
            best,
            splits.test,
            splits.categories,
            result,
            detections,
            pictures=args.pictures,
            min_score=args.picture_score,
        )

    return TrainingTask(
        model=detector,
        objective=objective,
        loader=loader,
        val_loader=val_loader,
        updates_per_epoch=updates_per_epoch,
        evaluate=evaluate,
        metric=AP if aim is None else value_of(AP, aim),
        observe=lambda candidate: detector_statistics(candidate, sample),
        write_config=write_detector_config,
        export=export,
        conclude=lambda row, epochs: conclude(aim, row),
        images=f"{splits.train.size} images, {splits.train.boxes} boxes of {len(splits.categories.names)} classes",
    )


def _make_objective(
    args: argparse.Namespace, detector: Any, updates_per_epoch: int, accelerator: Accelerator
) -> tuple[DetectionObjective | CostTarget, Aim | None]:
    """Make the detector's own loss; with a target, with a price on the cost of the backbone."""
    objective = DetectionObjective(args.seed)
    if args.target_cost is None:
        return objective, None
    if len(args.target_cost) > 1:
        raise BadValue("--target-cost takes one cost for a detector; a range of budgets is for classifiers")
    body, size = detector.backbone.body, (3, args.min_size[-1], args.min_size[-1])
    priced, aim = with_cost_target(args, objective, body, size, args.updates or args.epochs * updates_per_epoch)
    accelerator.print(f"backbone: {describe_gates(body, priced.expected.minimum)}")
    return priced, aim
