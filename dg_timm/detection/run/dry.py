"""``--dry-run`` and ``--data-summary``: what the training of a detector would do, and what its data hold."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dg_timm.detection.data.summary import draw_detection_samples
from dg_timm.detection.objective import DetectionObjective
from dg_timm.detection.run.build import build_detector, load_data, make_detection_loader
from dg_timm.graph.stage import graph_stages
from dg_timm.training.loop.optimization import BatchSplit
from dg_timm.training.run.build import build_optimization
from dg_timm.training.run.preview import print_plan


def dry_run_detector(args: argparse.Namespace, accelerator: Accelerator, split: BatchSplit) -> None:
    """Print model, data, schedule and about how long an update takes."""
    splits = load_data(args, accelerator)
    detector = build_detector(args, splits.categories, accelerator).to(accelerator.device)
    params = sum(p.numel() for p in detector.parameters())
    print(f"model        {args.detector} over {args.model}: {params / 1e6:.3f} M parameters, "
          f"{len(graph_stages(detector))} dynamic stages")  # fmt: skip
    updates = splits.train.size // split.images
    optimizer, schedule, epochs = build_optimization(args, detector, updates)
    print_plan(args, split, optimizer, schedule, updates, epochs)
    loader = make_detection_loader(splits.train, args, split.micro_batch, accelerator, training=True)
    batch = next(loader.epoch(0)).move_to(accelerator.device, torch.contiguous_format)
    seconds = _time_step(detector, batch, args.seed) * split.accumulation
    loader.close()
    print(f"time         about {seconds:.2f} s an update, {seconds * updates / 60:.1f} minutes an epoch on "
          f"{accelerator.device} (one batch, measured now; evaluation comes on top)")  # fmt: skip


def summarize_detection_data(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Print what the data hold, and save a picture of samples with their boxes; ``--data-summary``.

    Raises:
        BadValue: the data can't be used, or the picture can't be written.
    """
    splits = load_data(args, accelerator)
    shown = draw_detection_samples(splits.train, splits.categories, Path(args.data_summary))
    print(f"{args.data_summary} shows {shown} of them")


def _time_step(detector: Any, batch: Any, seed: int) -> float:
    """Seconds of a forward and backward pass: the better of two after a warm-up."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        loss = DetectionObjective(seed)(detector.train(), batch, 0).loss.mean()
        loss.backward()
        loss.item()
        times.append(time.perf_counter() - start)
    return min(times[1:])
