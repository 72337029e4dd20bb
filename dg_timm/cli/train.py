"""Train any timm or dg_timm network through Accelerate.

    python train_scripts/train.py --recipe digits                         # two minutes on two cores
    python train_scripts/train.py --recipe cifar10_finetune --data path/to/cifar10 --pretrained
    torchrun --nproc_per_node 2 train_scripts/train.py --recipe digits    # several processes, on CPUs or GPUs
    accelerate launch train_scripts/train.py --recipe imagenet_resnet --model dg_resnet50 --mixed-precision bf16
    python train_scripts/train.py --recipe imagenet_resnet --dry-run      # what it would do
    python train_scripts/train.py --recipe digits --resume auto           # go on after any interruption

Options come from the recipe (train_scripts/recipes/*.yaml) and then from the command line. The batch size is that of an
update over all processes, so a recipe means the same on one device or many.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from dg_timm._version import __version__
from dg_timm.analysis.counting import cost
from dg_timm.graph.stage import graph_stages
from dg_timm.hub.card import Accuracy, Card
from dg_timm.hub.save import write_config
from dg_timm.training.data.loading import sample_images
from dg_timm.training.loop.distributed import StopRequest
from dg_timm.training.loop.evaluation import evaluate_model
from dg_timm.training.loop.optimization import BatchSplit, scaled_lr, split_batch
from dg_timm.training.run import arguments
from dg_timm.training.run.build import build_network, load_data, make_loader, make_transforms, with_cost_target
from dg_timm.training.run.dry import dry_run
from dg_timm.training.run.networks import save_model
from dg_timm.training.run.report import TOP1, Metric, Row, graph_statistics, hardware
from dg_timm.training.run.session import Task, run, train

# A point of top-1 is worth a hundredth of the static network's cost: what is too dear is not the best.
VALUE = Metric("value", "top-1 (%) less 100 x (cost - target)")
RECIPES = Path(__file__).parents[1] / "recipes"
VAL_BATCH = 64  # not that of training, which depends on the processes: rounding would, too
GRAPH_IMAGES = 64  # over which the graph's statistics are averaged each epoch


def parse(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_run_options(parser)
    arguments.add_data_options(parser)
    arguments.add_image_options(parser)
    arguments.add_augmentation_options(parser)
    arguments.add_model_options(parser)
    arguments.add_optimization_options(parser)
    arguments.add_objective_options(parser)
    return arguments.parse(parser, argv, RECIPES)


def build(args: argparse.Namespace, accelerator: Accelerator, split: BatchSplit) -> Task:
    """Data and network of a classification; nothing is written."""
    if (args.mixup or args.cutmix) and split.micro_batch % 2:
        raise ValueError(f"mixup pairs the images of a batch: the micro-batch must be even, not {split.micro_batch}")
    with accelerator.local_main_process_first():
        splits = load_data(args)
    names = splits.label_names
    if args.num_classes and args.num_classes < len(names):
        raise ValueError(f"--num-classes {args.num_classes} is fewer than the {len(names)} classes of {args.data}")
    num_classes = args.num_classes or len(names)
    label_names = names if num_classes == len(names) else None
    rows = (splits.train.streamed and args.epoch_size) or splits.train.size
    if rows is None:
        raise ValueError(f"{args.data} does not tell how many rows it has; give --epoch-size (the schedule needs it)")

    set_seed(args.seed)
    network = build_network(args, num_classes, accelerator)
    transforms = make_transforms(args, network.data_config)
    val_batch = args.val_batch_size or VAL_BATCH
    loader = make_loader(
        splits.train, args, transforms[0], names, split.micro_batch, accelerator, network.data_config, training=True
    )
    val_loader = make_loader(
        splits.test, args, transforms[1], names, val_batch, accelerator, network.data_config, training=False
    )
    updates_per_epoch = -(-rows // split.images) if splits.train.streamed else rows // split.images
    objective = with_cost_target(args, network, args.updates or args.epochs * updates_per_epoch)
    sample = None
    if graph_stages(network.model) and (accelerator.is_main_process or args.target_cost is not None):
        sample = sample_images(val_loader, GRAPH_IMAGES).to(accelerator.device)

    def evaluate(candidate: nn.Module, stopping: Callable[[], bool]) -> Row:
        figures = evaluate_model(
            candidate, val_loader.epoch(0), accelerator, channels_last=args.channels_last, stop=stopping
        )
        row: Row = {"loss": figures.loss, "top1": figures.top1}
        row |= {"top5": figures.top5} if num_classes > 5 else {}
        if args.target_cost is not None and sample is not None:
            mean = cost(candidate, sample).mean().item()
            row |= {"cost": mean, "value": figures.top1 - 100 * max(0.0, mean - args.target_cost)}
        return row

    def observe(candidate: nn.Module) -> Row:
        return graph_statistics(candidate, sample) if sample is not None else {}

    def write_checkpoint_config(of: nn.Module, folder: Path) -> None:
        write_config(of, folder / "config.json", label_names=label_names, data_config=network.data_config)

    def export(best: nn.Module, row: Row, epochs: int, average: bool) -> None:
        """In Hub layout."""
        save_model(
            best,
            Path(args.output) / "model",
            label_names=label_names,
            data_config=network.data_config,
            card=describe(args, row, epochs, network.random, average, splits.test.size),
        )

    def on_epoch(epoch: int) -> None:
        mixup = network.objective.mixup
        if mixup is not None and args.mixup_off_epoch:
            mixup.mixup_enabled = epoch < args.mixup_off_epoch

    return Task(
        model=network.model,
        objective=objective,
        loader=loader,
        val_loader=val_loader,
        updates_per_epoch=updates_per_epoch,
        evaluate=evaluate,
        metric=TOP1 if args.target_cost is None else VALUE,
        observe=observe,
        write_config=write_checkpoint_config,
        export=export,
        images=f"{rows} images, {num_classes} classes",
        on_epoch=on_epoch,
        fixed_norms=args.freeze_norm,
    )


def describe(args: argparse.Namespace, row: Row, epochs: int, random: bool, ema: bool, images: Optional[int]) -> Card:
    """What the card says of the training, and only what this run measured."""
    name = Path(args.data).name if Path(args.data).exists() else args.data
    source = (
        "from the published weights" if args.pretrained else f"from {Path(args.initial_checkpoint or args.model).name}"
    )
    lr = scaled_lr(args.lr, args.batch_size, args.lr_base_batch, args.lr_base_scale)
    made = {
        "Training": f"{'from scratch' if random else source}, by `train_scripts/train.py` of dg_timm {__version__}",
        "Recipe": f"{Path(args.recipe or 'none').stem}; {row['epoch']} of {epochs} epochs, {args.opt}, "
        f"learning rate {lr:g}, batch {args.batch_size}" + (", average of the weights" if ema else ""),
    }
    if args.distill not in (None, "none"):
        made["Distilled from"] = Path(args.distill).name
    made |= {"Hardware": hardware(), "Seed": str(args.seed)}
    on_hub = name if re.fullmatch(r"[\w.-]+/[\w.-]+", args.data) and not Path(args.data).exists() else None
    measured = Accuracy(
        dataset=name,
        value=float(row["ema_top1" if ema else "eval_top1"]),
        split=args.val_split or "held out",  # which one it was depends on the data set
        images=images,
        spread="one seed, the best epoch on these images",
        hub_dataset=on_hub,
    )
    return Card(datasets=[on_hub] if on_hub else [], made=made, accuracies=[measured])


def main() -> int:
    args = parse()

    def work(accelerator: Accelerator, stop: StopRequest) -> None:
        if not args.dry_run:
            split = split_batch(args.batch_size, accelerator.num_processes, args.micro_batch)
            train(args, accelerator, stop, split, build)
        elif accelerator.is_main_process:
            dry_run(args, accelerator)

    return run(args, work, compile=args.compile)
