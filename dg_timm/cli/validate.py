"""Evaluate networks: top-1, top-5 and loss, exact under any number of processes. One JSON line a network.

    python train_scripts/validate.py output/train/model --data digits
    python train_scripts/validate.py dg_resnet50.a1_in1k resnet50.a1_in1k --data path/to/imagenet --val-split validation
    python train_scripts/validate.py hf-hub:org/name local-dir:folder output/train/checkpoints/best/ema --data ...
    torchrun --nproc_per_node 2 train_scripts/validate.py ...

A network is a timm or dg_* name (its published weights), hf-hub:org/name, local-dir:folder, or a folder in Hub
layout: a saved model, or a checkpoint of train.py (its ema/ has the average of the weights). Preprocessing
is the network's own.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import create_transform

import dg_timm
from dg_timm.graph.stage import graph_stages
from dg_timm.training.data.loading import sample_images
from dg_timm.training.data.sources import Splits
from dg_timm.training.loop.distributed import Agreement, make_accelerator
from dg_timm.training.loop.evaluation import evaluate_model
from dg_timm.training.run import arguments
from dg_timm.training.run import networks as models
from dg_timm.training.run.build import data_config_of, load_data, make_loader
from dg_timm.training.run.report import graph_statistics


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    arguments.add_data_options(parser)
    arguments.add_image_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--checkpoint", help="safetensors file or folder with weights for MODEL, in place of the published ones"
    )
    run.add_argument("--model-kwargs", nargs="+", action=arguments.KeyValues, default={}, metavar="KEY=VALUE")
    run.add_argument("--threshold", type=arguments.amount, help="one threshold for all nodes of dynamic networks")
    run.add_argument("--batch-size", type=arguments.positive, default=64, help="images at a time on a process")
    run.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    run.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=False)
    args = parser.parse_args()
    args.seed = 0  # nothing is drawn
    return args


def validate(name: str, splits: Splits, args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """The figures of one network."""
    model = models.create(
        name,
        pretrained=args.checkpoint is None,
        initial_checkpoint=args.checkpoint,
        in_chans=args.in_chans,
        **args.model_kwargs,
    )
    classes = len(splits.label_names)
    if model.num_classes not in (classes, args.num_classes):
        raise ValueError(
            f"{name} has {model.num_classes} classes, {args.data} has {classes}; if its labels are among those of the "
            f"network all the same, say so with --num-classes {model.num_classes}"
        )
    own = getattr(model, "pretrained_cfg", {}).get("label_names")
    if own and model.num_classes == classes and list(own) != splits.label_names:
        raise ValueError(f"{name} was trained on {list(own)[:5]}, {args.data} has {splits.label_names[:5]}")
    data_config = data_config_of(model, args)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(accelerator.device, memory_format=layout)
    if args.threshold is not None and graph_stages(model):
        dg_timm.set_threshold(model, args.threshold)
    transform = create_transform(**data_config)
    loader = make_loader(
        splits.test, args, transform, splits.label_names, args.batch_size, accelerator, data_config, training=False
    )
    start = time.perf_counter()
    figures = evaluate_model(model, loader.epoch(0), accelerator, channels_last=args.channels_last)
    seconds = time.perf_counter() - start
    counts = dg_timm.analysis.counting(model, data_config["input_size"])
    row: dict[str, Any] = dict(
        model=name,
        top1=figures.top1,
        top5=figures.top5 if classes > 5 else None,
        loss=figures.loss,
        images=figures.images,
        params=counts.params,
        multiply_adds=counts.multiply_adds,
        image_size=list(data_config["input_size"]),
        seconds=round(seconds, 2),
    )
    skipped = int(Agreement().sum(loader.skipped)[0])
    if skipped:
        row["skipped"] = skipped
    if graph_stages(model) and accelerator.is_main_process:
        row["cost"] = graph_statistics(model, sample_images(loader, 64).to(accelerator.device))["cost"]
    return row


def main() -> int:
    args = parse()
    try:
        accelerator = make_accelerator(mixed_precision=args.mixed_precision)
        with accelerator.local_main_process_first():
            splits = load_data(args)
        if accelerator.is_main_process:
            print(f"evaluating on {splits.test.name}: {splits.test.size or 'a stream of'} images", file=sys.stderr)
        rows = []
        for name in args.models:
            rows.append(validate(name, splits, args, accelerator))
            accelerator.print(json.dumps(rows[-1]), flush=True)
        accelerator.end_training()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if len(rows) > 1:
        width = max(len(row["model"]) for row in rows)
        titles = f"{'top-1 (%)':>10} {'top-5 (%)':>10} {'loss':>8} {'params (M)':>11} {'MACs (M)':>9} {'cost':>6}"
        accelerator.print(f"\n{'':{width}} {titles}")
        for row in rows:
            top5, cost = (f"{value:.3f}" if value is not None else "" for value in (row["top5"], row.get("cost")))
            accelerator.print(
                f"{row['model']:{width}} {row['top1']:10.3f} {top5:>10} {row['loss']:8.4f} "
                f"{row['params'] / 1e6:11.3f} {row['multiply_adds'] / 1e6:9.1f} {cost:>6}"
            )
    return 0
