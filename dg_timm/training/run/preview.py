"""``--dry-run`` and ``--data-summary``: what a run would do and how long it would take, and what its data hold."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dg_timm._errors import BadValue
from dg_timm.analysis.counting import complexity
from dg_timm.graph.stage import graph_stages
from dg_timm.training.data.splits import Splits, count_rows
from dg_timm.training.data.summary import describe_data, draw_samples
from dg_timm.training.loop.optimization import BatchSplit, split_batch
from dg_timm.training.run.build import Network, build_network, build_optimization
from dg_timm.training.run.build_data import epochs_of, load_data, make_transforms
from dg_timm.training.run.data_options import labeling_of_options

_TIMED_UPDATES = 3


def dry_run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Print model, parameter groups, schedule, batch arithmetic and an estimate of the time; leave no file.

    Raises:
        BadValue: for what would end the run before its first update.
    """
    split = split_batch(args.batch_size, accelerator.num_processes, args.micro_batch)
    classes, rows, source = _count_data(args)
    network = build_network(args, args.num_classes or classes, accelerator)
    updates = rows // split.images if not args.streaming else -(-rows // split.images)
    if updates == 0:
        raise BadValue(f"--batch-size {split.images} is more than the {rows} images of {source}")
    optimizer, schedule, epochs = build_optimization(args, network.model, updates)
    total = args.updates or epochs * updates
    counts = complexity(network.model, network.data_config["input_size"])

    size = " x ".join(map(str, network.data_config["input_size"]))
    print(
        f"model        {args.model}: {counts.params / 1e6:.3f} M parameters, {counts.multiply_adds / 1e6:.1f} M "
        f"multiply-adds at {size}, {len(graph_stages(network.model))} dynamic stages"
    )
    print(f"data         {source}: {rows} images to train on, {args.num_classes or classes} classes")
    if args.size_schedule is not None:
        sizes, _ = make_transforms(args, network.model, network.data_config, epochs_of(args, updates))
        print(f"sizes        {sizes.describe()}")
    print_plan(args, split, optimizer, schedule, updates, epochs)
    seconds = _time_update(network, split.micro_batch, accelerator) * split.accumulation
    print(
        f"time         about {seconds * updates / 60:.1f} minutes an epoch, {seconds * total / 3600:.2f} "
        f"hours in all on {accelerator.device} (forward and backward of random images, measured now; reading data and "
        "evaluation come on top)"
    )


def summarize_data(args: argparse.Namespace) -> None:
    """Print what the data hold, and save a picture of samples; ``--data-summary``.

    Raises:
        BadValue: the data can't be used, or the picture can't be written.
    """
    splits = load_data(args, labeling=labeling_of_options(args))
    print(describe_data(splits, args.data))
    shown = draw_samples(splits.train, splits.label_names, Path(args.data_summary))
    print(f"{args.data_summary} shows {shown} of them")


def _count_data(args: argparse.Namespace) -> tuple[int, int, str]:
    """Count classes and training images, and name the data; data whose size is given is not opened."""
    if args.epoch_size and args.num_classes:
        classes, rows, source = args.num_classes, args.epoch_size, f"{args.data} (not opened: its size is given)"
    else:
        with tempfile.TemporaryDirectory() as scratch:
            splits = _open_data(args, Path(scratch))
            classes, rows, source = len(splits.label_names), args.epoch_size or count_rows(splits.train), args.data
    return classes, min(rows, args.train_limit or rows), source


def _open_data(args: argparse.Namespace, cache_dir: Path) -> Splits:
    """Open the data as a stream, which copies nothing; where a stream does not tell enough, as the run would."""
    labeling = labeling_of_options(args)
    whole = {**vars(args), "train_limit": None, "val_limit": None}
    try:
        streamed = {**whole, "streaming": args.streaming or args.data != "digits"}
        return load_data(argparse.Namespace(**streamed), cache_dir, labeling=labeling)
    except BadValue:
        if args.streaming:
            raise
        return load_data(argparse.Namespace(**whole), cache_dir, labeling=labeling)


def print_plan(
    args: argparse.Namespace, split: BatchSplit, optimizer: Any, schedule: Any, updates: int, epochs: int
) -> None:
    """Print batch arithmetic, parameter groups and the learning rate by epoch."""
    print(
        f"batch        {split.images} images an update = {split.micro_batch} at a time x {split.accumulation} "
        f"accumulated x {split.processes} processes; {updates} updates an epoch, "
        f"{args.updates or epochs * updates} in {epochs} epochs"
    )
    print("parameter groups")
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        print(f"  {'graph' if group['graph'] else 'network':8} {len(group['params']):5} tensors {count / 1e6:10.4f} M "
              f"lr x {group['lr_scale']:<8.4g} weight decay {group['weight_decay']:g}")  # fmt: skip
    print(f"schedule     {args.sched}, learning rate by epoch (x its group's factor):")
    for epoch in sorted({0, *(round(epochs * k / 8) for k in range(9)), round(args.warmup_epochs)}):
        schedule.step_update(min(epoch, epochs) * updates)
        group = optimizer.param_groups[0]
        rate = f"{group['lr'] / group['lr_scale']:.6g}" if group["lr_scale"] else "frozen"
        print(f"  epoch {epoch:5} {rate}")


def _time_update(network: Network, size: int, accelerator: Accelerator) -> float:
    """Measure the seconds of a forward and backward pass of ``size`` images: a median after a warm-up."""
    model = network.model.to(accelerator.device).train()
    images = torch.randn(size, *network.data_config["input_size"], device=accelerator.device)
    times = []
    for _ in range(1 + _TIMED_UPDATES):
        start = time.perf_counter()
        model(images).sum().backward()
        next(p for p in model.parameters() if p.grad is not None).grad.sum().item()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[_TIMED_UPDATES // 2]
