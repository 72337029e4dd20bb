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
import shlex
import sys
from pathlib import Path
from typing import Any, Optional

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from timm.utils import ModelEmaV3
from torch import nn

from dg_timm.card import Accuracy, Card
from dg_timm.checkpoint import graph_stages
from dg_timm.hub import write_config
from dg_timm.training import arguments
from dg_timm.training.checkpoints import Checkpoints, find_fault, newest_sound, read_args
from dg_timm.training.dry_run import dry_run
from dg_timm.training.evaluation import evaluate_model
from dg_timm.training.models import save_model
from dg_timm.training.optimization import scaled_lr, split_batch
from dg_timm.training.processes import Agreement, StopRequest, make_accelerator
from dg_timm.training.report import Report, Row, graph_statistics, hardware
from dg_timm.training.setup import build_network, build_optimization, load_data, make_loader, make_transforms
from dg_timm.training.trainer import NonFiniteLoss, Plan, Stopped, Trainer
from dg_timm.version import __version__

RECIPES = Path(__file__).parent / "recipes"
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
    return arguments.parse(parser, argv, RECIPES)


def find_start(args: argparse.Namespace, accelerator: Accelerator, folder: Path) -> Optional[Path]:
    """The checkpoint to go on from, or None for a fresh run; ValueError if it is that of another training."""
    if args.resume is None:
        if (folder.parent / "args.yaml").exists():
            raise ValueError(f"{folder.parent} holds a run already: go on with --resume auto, or give another --output")
        return None
    # the main process looks: files may change under the others' eyes
    found: list[Any] = [None, []]
    if accelerator.is_main_process:
        found[:] = newest_sound(folder) if args.resume == "auto" else (args.resume, find_fault(Path(args.resume)))
    place, faults = broadcast_object_list(found)
    if args.resume == "auto":
        for line in faults:
            accelerator.print(f"passed over {line}")
        if place is None:
            accelerator.print(f"--resume auto: there is no checkpoint in {folder} to go on from, starting afresh")
            return None
    elif faults:
        raise ValueError(f"--resume {place}: {faults}")
    elif Path(place).resolve().parent != folder.resolve():
        raise ValueError(
            f"--resume {place} is of another run than --output {folder.parent}; to start afresh from its weights, give "
            f"--initial-checkpoint {place}"
        )
    changed = arguments.differences(vars(args), read_args(Path(place)))
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(
            f"{place} was written with other options; going on would be another training:\n  {lines}\n"
            "Give the same options, or start afresh from its weights: --initial-checkpoint, in another --output"
        )
    return folder / Path(place).resolve().name  # `last` and `best` are links


def build(args: argparse.Namespace, accelerator: Accelerator, stop: StopRequest) -> Trainer:
    """Data, network, optimizer and report, wired up; nothing is written."""
    output = Path(args.output)
    split = split_batch(args.batch_size, accelerator.num_processes, args.micro_batch)
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
    updates_per_epoch = -(-rows // split.images) if splits.train.streamed else rows // split.images

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
    optimizer, schedule, epochs = build_optimization(args, network.model, updates_per_epoch)
    model, optimizer = accelerator.prepare(network.model, optimizer)
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    ema = None
    if args.ema_decay is not None:
        ema = ModelEmaV3(plain, decay=args.ema_decay, use_warmup=args.ema_warmup)
    set_seed(args.seed, device_specific=True)  # from here on each process draws its own dropout

    def write_checkpoint_config(of: nn.Module, folder: Path) -> None:
        write_config(of, folder / "config.json", label_names=label_names, data_config=network.data_config)

    sample = None
    if accelerator.is_main_process and graph_stages(plain):
        sample = val_loader.sample(GRAPH_IMAGES).to(accelerator.device)
    agreement, report = Agreement(), Report(output, accelerator)
    checkpoints = Checkpoints(
        output / "checkpoints",
        accelerator,
        agreement,
        plain,
        ema.module if ema else None,
        keep=args.keep,
        args=vars(args),
        write_config=write_checkpoint_config,
    )

    def evaluate() -> Row:
        row: Row = {}
        best = -1.0
        for prefix, candidate in {"eval": plain, **({"ema": ema.module} if ema else {})}.items():
            figures = evaluate_model(
                candidate,
                val_loader.epoch(0),
                accelerator,
                channels_last=args.channels_last,
                stop=lambda: stop.signal is not None,
            )
            row |= {f"{prefix}_loss": figures.loss, f"{prefix}_top1": figures.top1}
            row |= {f"{prefix}_top5": figures.top5} if num_classes > 5 else {}
            best = max(best, figures.top1)
        skipped, val_loader.skipped = int(agreement.sum(val_loader.skipped)[0]), 0
        if skipped:
            row["eval_skipped_images"] = skipped // (2 if ema else 1)
        if sample is not None:
            row |= graph_statistics(plain, sample)
        return row | {"metric": best}

    def export(row: Row) -> None:
        """The best network so far (the average of the weights, where that is better) in Hub layout."""
        use_ema = ema is not None and float(row["ema_top1"]) >= float(row["eval_top1"])
        save_model(
            ema.module if use_ema and ema else plain,
            output / "model",
            label_names=label_names,
            data_config=network.data_config,
            card=describe(args, row, epochs, network.random, use_ema, splits.test.size),
        )

    def on_epoch(epoch: int) -> None:
        mixup = network.objective.mixup
        if mixup is not None and args.mixup_off_epoch:
            mixup.mixup_enabled = epoch < args.mixup_off_epoch

    plan = Plan(
        epochs=epochs,
        split=split,
        updates_per_epoch=updates_per_epoch,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        save_every=args.save_every,
        log_every=args.log_every,
        patience=args.patience,
        fixed_norms=args.freeze_norm,
        dist_bn=args.dist_bn,
        channels_last=args.channels_last,
    )
    trainer = Trainer(
        accelerator, model, optimizer, schedule, ema, loader, network.objective, evaluate, checkpoints, report,
        agreement, stop, plan, on_epoch, export,
    )  # fmt: skip
    accelerator.print(
        f"{args.model}: {len(network.learning)} tensors learn; {rows} images, {num_classes} classes; "
        f"{split.images} images an update ({split.micro_batch} x {split.accumulation} x {split.processes} processes); "
        f"{epochs} epochs of {updates_per_epoch} updates"
    )
    return trainer


def train(args: argparse.Namespace, accelerator: Accelerator, stop: StopRequest) -> None:
    output = Path(args.output)
    start = find_start(args, accelerator, output / "checkpoints")
    trainer = build(args, accelerator, stop)
    trainer.checkpoints.clean(start)
    position = None
    if start is not None:
        position = trainer.resume(start)
        accelerator.print(
            f"going on from {start}: epoch {trainer.progress.epoch + 1}, update {trainer.progress.update}"
        )
    trainer.report.begin(vars(args), trackers=bool(args.report_to))
    try:
        trainer.run(position)
    finally:
        accelerator.end_training()
    progress = trainer.progress
    accelerator.print(f"best: {progress.best_metric:.2f} % in epoch {progress.best_epoch}; {output / 'model'} holds it")


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
    stop = StopRequest()
    with stop.listening():
        try:
            accelerator = make_accelerator(
                mixed_precision=args.mixed_precision,
                compile=args.compile,
                trackers=args.report_to,
                folder=Path(args.output),
            )
            if args.dry_run:
                if accelerator.is_main_process:
                    dry_run(args, accelerator)
            else:
                train(args, accelerator, stop)
        except Stopped as stopped:
            accelerator.print(f"{stopped}. Go on with:\n  {command_to_go_on(sys.argv, accelerator.num_processes)}")
            return 128 + stopped.signal
        except NonFiniteLoss as error:
            accelerator.print(
                f"error: {error}. A smaller --lr, --warmup-epochs or --clip-grad may help", file=sys.stderr
            )
            return 1
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
    return 0


def command_to_go_on(argv: list[str], processes: int) -> str:
    """The command that started this run, with --resume auto."""
    kept, skip = [], False
    for token, following in zip(argv, [*argv[1:], "--"], strict=True):
        if token == "--resume":
            skip = not following.startswith("--")  # its value
        elif skip or token.startswith("--resume="):
            skip = False
        else:
            kept.append(token)
    command = shlex.join([*kept, "--resume", "auto"])
    return (
        f"python {command}"
        if processes == 1
        else f"torchrun --nproc_per_node ... (as before, {processes} processes) {command}"
    )


if __name__ == "__main__":
    sys.exit(main())
