"""Evaluate networks: top-1, top-5 and loss, exact under any number of processes. Prints a JSON line for each network.

Of a network that was trained on several labels: mAP, F1 and loss.

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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import create_transform

import dg_timm
from dg_timm._command_line import CommandParser
from dg_timm._errors import BadValue
from dg_timm.analysis.counting import count_costs
from dg_timm.cli.errors import cli_errors
from dg_timm.graph.stage import graph_stages
from dg_timm.hub.labeling import LOSSES, Labeling, labeling_of
from dg_timm.training.data.splits import Splits
from dg_timm.training.data.summary import describe_data
from dg_timm.training.loop.distributed import HostAllReduce, make_accelerator
from dg_timm.training.loop.evaluation import evaluate_model
from dg_timm.training.loop.figures import figures_of
from dg_timm.training.run import data_options, networks
from dg_timm.training.run.build_data import data_config_of, load_data, make_loader
from dg_timm.training.run.classes import match_classes
from dg_timm.training.run.option_types import KeyValues, flag, non_negative_float, positive_int


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="networks to evaluate, one after the other")
    data_options.add_data_options(parser)
    data_options.add_task_options(parser, None)
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


def create_network(name: str, args: argparse.Namespace, labeling: Labeling | None) -> Any:
    """Make a network; what its outputs mean is noted as ``labeling``.

    Args:
        name: any that :func:`dg_timm.training.run.networks.create` takes.
        args: options of the command.
        labeling: of the data as they were loaded for the networks before; None if there was none.

    Raises:
        BadValue: for a network that was trained for another task than those before.
    """
    model = networks.create(
        name,
        pretrained=args.checkpoint is None,
        initial_checkpoint=args.checkpoint,
        in_chans=args.in_chans,
        **args.model_kwargs,
    )
    found = labeling_of(model)
    if args.task not in (None, found.task):
        found = Labeling(args.task, LOSSES[args.task][0])
    if labeling is not None and labeling.task != found.task:
        raise BadValue(f"{name} was trained with --task {found.task}, and the networks before with --task "
                       f"{labeling.task}: evaluate them one by one")  # fmt: skip
    model.labeling = found
    return model


def validate_network(
    name: str, model: Any, splits: Splits, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Evaluate one network; return its figures, the same in every process.

    Raises:
        BadValue: for a network whose classes are not those of the data.
    """
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
    figures = figures_of(labeling_of(model), model.num_classes)
    costs = count_costs(model, data_config["input_size"]) if graph_stages(model) else None
    result = evaluate_model(
        model, loader.epoch(0), accelerator, channels_last=args.channels_last, figures=figures, costs=costs
    )
    seconds = time.perf_counter() - start
    counts = dg_timm.complexity(model, data_config["input_size"])
    row: dict[str, Any] = dict(
        model=name,
        **_shown(result.figures, model.num_classes),
        images=result.images,
        params=counts.params,
        multiply_adds=counts.multiply_adds,
        image_size=list(data_config["input_size"]),
        seconds=round(seconds, 2),
    )
    skipped = int(HostAllReduce().sum(loader.skipped)[0])
    if skipped:
        row["skipped"] = skipped
    if costs is not None:
        row["cost"] = round(result.costs.mean().item(), 5)
    return row


def _shown(figures: Mapping[str, float], num_classes: int) -> dict[str, Any]:
    """Put the loss last; of five classes or fewer, the five best say nothing."""
    shown: dict[str, Any] = {key: value for key, value in figures.items() if key != "loss"}
    if "top1" in shown:
        shown["top5"] = shown.get("top5") if num_classes > 5 else None
    return shown | {"loss": figures["loss"]}


_TITLES = {"top1": "top-1 (%)", "top5": "top-5 (%)", "map": "mAP (%)", "micro_f1": "micro F1", "macro_f1": "macro F1"}


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the figures of several networks side by side."""
    width = max(len(row["model"]) for row in rows)
    keys = [key for key in _TITLES if key in rows[0]]
    titles = " ".join(f"{_TITLES[key]:>10}" for key in keys)
    lines = [f"{'':{width}} {titles} {'loss':>8} {'params (M)':>11} {'MACs (M)':>9} {'cost':>6}"]
    for row in rows:
        shown = " ".join(f"{'' if row[key] is None else format(row[key], '.3f'):>10}" for key in keys)
        cost = f"{row['cost']:.3f}" if "cost" in row else ""
        lines.append(
            f"{row['model']:{width}} {shown} {row['loss']:8.4f} "
            f"{row['params'] / 1e6:11.3f} {row['multiply_adds'] / 1e6:9.1f} {cost:>6}"
        )
    return "\n".join(lines)


def _load(args: argparse.Namespace, labeling: Labeling, accelerator: Accelerator) -> Splits:
    """Load the data, and say what they hold."""
    with accelerator.local_main_process_first():
        splits = load_data(args, only_evaluate=True, labeling=labeling)
    if accelerator.is_main_process:
        print(describe_data(splits, args.data), file=sys.stderr)
    return splits


@cli_errors
def main() -> int:
    """Evaluate all networks; return the exit status."""
    args = parse()
    data_options.require_data(args)
    accelerator = make_accelerator(mixed_precision=args.mixed_precision)
    rows: list[dict[str, Any]] = []
    splits, labeling = None, None
    for name in args.models:
        model = create_network(name, args, labeling)
        if splits is None:
            labeling = labeling_of(model)
            splits = _load(args, labeling, accelerator)
        rows.append(validate_network(name, model, splits, args, accelerator))
        accelerator.print(json.dumps(rows[-1]), flush=True)
    accelerator.end_training()
    if len(rows) > 1:
        accelerator.print(f"\n{format_table(rows)}")
    return 0
