"""Evaluate networks: top-1, top-5 and loss, exact under any number of processes. Prints a JSON line for each network.

    dg-timm validate output/train/model --data digits
    dg-timm validate dg_resnet50.a1_in1k resnet50.a1_in1k --data path/to/imagenet --val-split validation
    dg-timm validate hf-hub:org/name local-dir:folder output/train/checkpoints/best/ema --data ...
    torchrun --nproc_per_node 2 train_scripts/validate.py ...

A network is a timm or dg_* name (its published weights), hf-hub:org/name, local-dir:folder, or a folder in Hub
layout: a saved model, or a checkpoint of train.py (its ema/ has the average of the weights). Preprocessing
is the network's own.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import create_transform

import dg_timm
from dg_timm._command_line import CommandParser
from dg_timm.cli.errors import cli_errors
from dg_timm.graph.stage import graph_stages
from dg_timm.training.data.loader import sample_images
from dg_timm.training.data.splits import Splits
from dg_timm.training.data.summary import describe_data
from dg_timm.training.loop.distributed import HostAllReduce, make_accelerator
from dg_timm.training.loop.evaluation import evaluate_model, graph_statistics
from dg_timm.training.run import data_options, networks
from dg_timm.training.run.build_data import data_config_of, load_data, make_loader
from dg_timm.training.run.classes import match_classes
from dg_timm.training.run.option_types import KeyValues, flag, non_negative_float, positive_int

COST_IMAGES = 64  # over which the mean cost is taken


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="networks to evaluate, one after the other")
    data_options.add_data_options(parser)
    data_options.add_image_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--checkpoint",
        help="safetensors file or folder with weights for MODEL, in place of the published ones; by default those",
    )
    run.add_argument(
        "--model-kwargs",
        nargs="+",
        action=KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="further arguments of the networks; by default none",
    )
    run.add_argument(
        "--threshold",
        type=non_negative_float,
        help="one threshold for all nodes of dynamic networks; by default the learned ones",
    )
    run.add_argument("--batch-size", type=positive_int, default=64, help="number of images at a time on a process")
    run.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default="no",
        help="precision of autocast; fp16 needs a GPU",
    )
    flag(run, "--channels-last", False, "lay images and weights out with channels last")
    args = parser.parse_args(argv)
    args.seed = 0  # nothing is drawn
    return args


def validate_network(name: str, splits: Splits, args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Evaluate one network; return its figures, the same in every process but for ``cost``.

    Raises:
        BadValue: for a network whose classes are not those of the data.
    """
    model = networks.create(
        name,
        pretrained=args.checkpoint is None,
        initial_checkpoint=args.checkpoint,
        in_chans=args.in_chans,
        **args.model_kwargs,
    )
    label_names = match_classes(name, model, splits, args.data, args.num_classes)
    data_config = data_config_of(model, args)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(accelerator.device, memory_format=layout)
    if args.threshold is not None and graph_stages(model):
        dg_timm.set_threshold(model, args.threshold)
    transform = create_transform(**data_config)
    loader = make_loader(
        splits.test, args, transform, label_names, args.batch_size, accelerator, data_config, training=False
    )
    start = time.perf_counter()
    result = evaluate_model(model, loader.epoch(0), accelerator, channels_last=args.channels_last)
    seconds = time.perf_counter() - start
    counts = dg_timm.complexity(model, data_config["input_size"])
    row: dict[str, Any] = dict(
        model=name,
        top1=result.top1,
        top5=result.top5 if model.num_classes > 5 else None,
        loss=result.loss,
        images=result.images,
        params=counts.params,
        multiply_adds=counts.multiply_adds,
        image_size=list(data_config["input_size"]),
        seconds=round(seconds, 2),
    )
    skipped = int(HostAllReduce().sum(loader.skipped)[0])
    if skipped:
        row["skipped"] = skipped
    if graph_stages(model) and accelerator.is_main_process:
        row["cost"] = graph_statistics(model, sample_images(loader, COST_IMAGES).to(accelerator.device))["cost"]
    return row


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the figures of several networks side by side."""
    width = max(len(row["model"]) for row in rows)
    titles = f"{'top-1 (%)':>10} {'top-5 (%)':>10} {'loss':>8} {'params (M)':>11} {'MACs (M)':>9} {'cost':>6}"
    lines = [f"{'':{width}} {titles}"]
    for row in rows:
        top5, cost = (f"{value:.3f}" if value is not None else "" for value in (row["top5"], row.get("cost")))
        lines.append(
            f"{row['model']:{width}} {row['top1']:10.3f} {top5:>10} {row['loss']:8.4f} "
            f"{row['params'] / 1e6:11.3f} {row['multiply_adds'] / 1e6:9.1f} {cost:>6}"
        )
    return "\n".join(lines)


@cli_errors
def main() -> int:
    """Evaluate all networks; return the exit status."""
    args = parse()
    data_options.require_data(args)
    accelerator = make_accelerator(mixed_precision=args.mixed_precision)
    with accelerator.local_main_process_first():
        splits = load_data(args, only_evaluate=True)
    if accelerator.is_main_process:
        print(describe_data(splits, args.data), file=sys.stderr)
    rows = []
    for name in args.models:
        rows.append(validate_network(name, splits, args, accelerator))
        accelerator.print(json.dumps(rows[-1]), flush=True)
    accelerator.end_training()
    if len(rows) > 1:
        accelerator.print(f"\n{format_table(rows)}")
    return 0
