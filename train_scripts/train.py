"""Train any timm or dg_timm network through Accelerate.

    python train_scripts/train.py --recipe digits                         # two minutes on two cores
    python train_scripts/train.py --recipe cifar10_finetune --data path/to/cifar10 --initial-checkpoint weights.safetensors
    torchrun --nproc_per_node 2 train_scripts/train.py --recipe digits    # several processes, on CPUs or GPUs
    accelerate launch --multi_gpu --mixed_precision bf16 train_scripts/train.py --recipe imagenet_resnet --model dg_resnet50
    python train_scripts/train.py --recipe imagenet_resnet --dry-run      # what it would do
    python train_scripts/train.py --recipe digits --resume auto           # go on after any interruption

Options come from the recipe (train_scripts/recipes/*.yaml) and then from the command line. The batch size is that of an
update over all processes, so a recipe means the same on one device or many.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional

import datasets
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from safetensors.torch import save_file
from timm.data import Mixup, create_transform, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn

import dg_timm
from dg_timm.checkpoint import graph_stages
from dg_timm.hub import write_config
from dg_timm.training import arguments, models, optimization
from dg_timm.training.checkpoints import Checkpoints, read_args
from dg_timm.training.evaluation import evaluate_model
from dg_timm.training.loading import Images, IndexOrder, Loader, Share, StreamOrder
from dg_timm.training.objective import Classification
from dg_timm.training.processes import Agreement, StopRequest, make_accelerator
from dg_timm.training.report import Report, Row, graph_statistics
from dg_timm.training.sources import Split, Splits, count_rows, load_splits
from dg_timm.training.trainer import NonFiniteLoss, Plan, Stopped, Trainer

RECIPES = Path(__file__).parent / "recipes"


def parse(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_run_options(parser)
    arguments.add_data_options(parser)
    arguments.add_image_options(parser)
    arguments.add_augmentation_options(parser)
    arguments.add_model_options(parser)
    arguments.add_optimization_options(parser)
    return arguments.parse(parser, argv, RECIPES)


# --------------------------------------------------------------------------- data


def load_data(args: argparse.Namespace) -> Splits:
    names = None
    if args.label_names:
        names = Path(args.label_names).read_text().splitlines()
    elif args.num_classes and args.streaming:
        names = [str(k) for k in range(args.num_classes)]
    splits = load_splits(
        args.data,
        val_source=args.val_data,
        train_split=args.train_split,
        val_split=args.val_split,
        image_key=args.image_key,
        label_key=args.label_key,
        label_names=names,
        streaming=args.streaming,
        seed=args.seed,
    )
    return splits._replace(
        train=limit(splits.train, args.train_limit, "--train-limit"), test=limit(splits.test, args.val_limit, "--val-limit")
    )


def limit(split: Split, size: Optional[int], option: str) -> Split:
    """A fixed random choice of ``size`` rows (of the data, not of the run: every seed gets the same)."""
    if size is None:
        return split
    if split.size is None or split.streamed:
        raise ValueError(f"{option} can't choose among the rows of a stream")
    chosen = torch.randperm(split.size, generator=torch.Generator().manual_seed(0))[:size]
    return Split(split.rows.select(sorted(chosen.tolist())), split.name, min(size, split.size))


def make_loader(
    split: Split,
    args: argparse.Namespace,
    transform: Any,
    label_names: list[str],
    batch_size: int,
    accelerator: Accelerator,
    data_config: dict[str, Any],
    *,
    training: bool,
) -> Loader:
    share = Share(accelerator.process_index, accelerator.num_processes)
    order: Any
    if split.streamed:
        if training and args.aug_repeats > 1:
            raise ValueError("--aug-repeats needs a data set that is not streamed")
        shards = split.rows.num_shards
        if training and shards % share.processes:
            accelerator.print(
                f"{split.name} has {shards} shards for {share.processes} processes: "
                + ("each reads them all, and keeps its part" if shards < share.processes else "some will wait for others")
            )
        order = StreamOrder(split.rows, batch_size, share, shuffle=training, seed=args.seed, buffer=args.shuffle_buffer)
    else:
        assert split.size is not None
        if training and split.size < args.batch_size:
            raise ValueError(f"--batch-size {args.batch_size} is more than the {split.size} images of {split.name}")
        order = IndexOrder(
            split.size,
            batch_size,
            share,
            shuffle=training,
            seed=args.seed,
            multiple=args.batch_size if training else 1,
            repeats=args.aug_repeats if training else 1,
        )
    random = training and args.augment
    images = Images(split, transform, label_names, channels=data_config["input_size"][0], seed=args.seed if random else None)
    return Loader(
        order,
        images,
        data_config["input_size"],
        workers=args.workers,
        pin_memory=accelerator.device.type == "cuda",
        on_bad_image=args.on_bad_image,
        report=lambda line: print(line, flush=True),
    )


def make_transforms(args: argparse.Namespace, data_config: dict[str, Any]) -> tuple[Any, Any]:
    test = create_transform(**data_config)
    if not args.augment:
        return test, test
    train = create_transform(
        **data_config,
        is_training=True,
        train_crop_mode=args.train_crop_mode,
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.auto_augment,
        re_prob=args.reprob,
        re_mode=args.remode,
    )
    return train, test


# --------------------------------------------------------------------------- model


class Network(NamedTuple):
    model: nn.Module
    objective: Classification
    data_config: dict[str, Any]
    learning: list[str]  # names of the parameters that are not frozen
    random: bool  # no weights were loaded


def build_network(args: argparse.Namespace, num_classes: int, accelerator: Accelerator) -> Network:
    options = dict(in_chans=args.in_chans, drop_rate=args.drop, drop_path_rate=args.drop_path, **args.model_kwargs)
    model = models.create(
        args.model,
        pretrained=args.pretrained,
        initial_checkpoint=args.initial_checkpoint,
        num_classes=num_classes,
        **options,
    )
    own_classifier = models.same_classifier(model, args.model, args.initial_checkpoint, args.pretrained)
    learning = models.freeze(model, args.freeze, not own_classifier)
    image_args = dict(
        input_size=(model.in_chans, args.image_size, args.image_size) if args.image_size else None,
        **{key: getattr(args, key) for key in ("mean", "std", "interpolation", "crop_pct")},
    )
    data_config = resolve_data_config({k: v for k, v in image_args.items() if v is not None}, model=model)
    teacher = None
    if args.distill:
        teacher = models.create_teacher(args.distill, model, args.model, not own_classifier, in_chans=args.in_chans)
        teacher = teacher.to(accelerator.device)
    mixup = None
    if args.mixup or args.cutmix:
        mixup = Mixup(
            args.mixup,
            args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    mean, std = (torch.tensor(data_config[key], device=accelerator.device).view(1, -1, 1, 1) for key in ("mean", "std"))
    objective = Classification(
        num_classes,
        smoothing=args.smoothing,
        loss=args.loss,
        mixup=mixup,
        teacher=teacher,
        distill_weight=args.distill_weight,
        temperature=args.distill_temperature,
        student_norm=(mean, std),
        seed=args.seed,
    )
    if args.sync_bn:
        if accelerator.device.type != "cuda":
            raise ValueError("--sync-bn needs GPUs")
        model = convert_sync_batchnorm(model)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Network(model, objective, data_config, learning, not (args.pretrained or args.initial_checkpoint))


def build_optimization(
    args: argparse.Namespace, model: nn.Module, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any, int]:
    groups = optimization.parameter_groups(
        model, weight_decay=args.weight_decay, layer_decay=args.layer_decay, graph_lr_scale=args.graph_lr_scale
    )
    lr = optimization.scaled_lr(args.lr, args.batch_size, args.lr_base_batch, args.lr_base_scale)
    optimizer = optimization.create_optimizer(groups, opt=args.opt, lr=lr, momentum=args.momentum, options=args.opt_kwargs)
    keys = ("sched", "epochs", "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs", "decay_rate", "decay_epochs",
            "decay_milestones", "warmup_prefix")  # fmt: skip
    schedule, epochs = optimization.create_schedule(
        optimizer, updates_per_epoch=updates_per_epoch, **{key: getattr(args, key) for key in keys}
    )
    return optimizer, schedule, epochs


# --------------------------------------------------------------------------- runs


def dry_run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Print model, parameter groups, schedule, batch arithmetic and an estimate of the time; leave no file."""
    split = optimization.split_batch(args.batch_size, accelerator.num_processes, args.micro_batch)
    if args.epoch_size and args.num_classes:
        classes, rows, source = args.num_classes, args.epoch_size, f"{args.data} (not opened: its size is given)"
    else:
        streaming, args.streaming = args.streaming, args.data != "digits"  # reading does not copy the data to the cache
        with tempfile.TemporaryDirectory() as scratch:
            datasets.config.HF_DATASETS_CACHE = Path(scratch)
            splits = load_data(argparse.Namespace(**{**vars(args), "train_limit": None, "val_limit": None}))
            classes, rows, source = len(splits.label_names), args.epoch_size or count_rows(splits.train), args.data
        args.streaming = streaming
        rows = min(rows, args.train_limit or rows)
    network = build_network(args, args.num_classes or classes, accelerator)
    updates = rows // split.images if not args.streaming else -(-rows // split.images)
    if updates == 0:
        raise ValueError(f"--batch-size {split.images} is more than the {rows} images of {source}")
    optimizer, schedule, epochs = build_optimization(args, network.model, updates)
    counts = dg_timm.complexity(network.model, network.data_config["input_size"])

    print(f"model        {args.model}: {counts.params / 1e6:.3f} M parameters, {counts.multiply_adds / 1e6:.1f} M multiply-adds "
          f"at {' x '.join(map(str, network.data_config['input_size']))}, {len(graph_stages(network.model))} graphs")  # fmt: skip
    print(f"data         {source}: {rows} images to train on, {args.num_classes or classes} classes")
    print(f"batch        {split.images} images an update = {split.micro_batch} at a time x {split.accumulation} accumulated "
          f"x {split.processes} processes; {updates} updates an epoch, {epochs * updates} in {epochs} epochs")  # fmt: skip
    print("parameter groups")
    for group in optimizer.param_groups:
        size = sum(p.numel() for p in group["params"])
        print(f"  {'graph' if group['graph'] else 'network':8} {len(group['params']):5} tensors {size / 1e6:10.4f} M   "
              f"lr x {group['lr_scale']:<8.4g} weight decay {group['weight_decay']:g}")  # fmt: skip
    print(f"schedule     {args.sched}, learning rate by epoch (x its group's factor):")
    for epoch in sorted({0, *(round(epochs * k / 8) for k in range(9)), round(args.warmup_epochs)}):
        schedule.step_update(min(epoch, epochs) * updates)
        group = optimizer.param_groups[0]
        print(f"  epoch {epoch:5} {group['lr'] / group['lr_scale']:.6g}" if group["lr_scale"] else f"  epoch {epoch:5} frozen")
    seconds = time_update(network, split.micro_batch, accelerator) * split.accumulation
    print(f"time         about {seconds * updates / 60:.1f} minutes an epoch and {seconds * updates * epochs / 3600:.2f} hours in all "
          f"on {accelerator.device} (forward and backward of random images, measured now; not the reading of data)")  # fmt: skip


def time_update(network: Network, size: int, accelerator: Accelerator) -> float:
    """Seconds of a forward and backward pass of ``size`` images: the median of 3 after a warm-up."""
    model = network.model.to(accelerator.device).train()
    images = torch.randn(size, *network.data_config["input_size"], device=accelerator.device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        model(images).sum().backward()
        next(p for p in model.parameters() if p.grad is not None).grad.sum().item()  # type: ignore[union-attr]
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


def find_start(args: argparse.Namespace, accelerator: Accelerator, checkpoints: Checkpoints) -> Optional[Path]:
    """The checkpoint to go on from, or None for a fresh run; nothing of an earlier run is overwritten."""
    if args.resume is None:
        return None
    if args.resume == "auto":
        place, skipped = checkpoints.newest_sound()
        for line in skipped:
            accelerator.print(f"passed over {line}")
        if place is None:
            accelerator.print(f"--resume auto: no checkpoint in {checkpoints.folder} yet, starting afresh")
            return None
    else:
        place = Path(args.resume)
        fault = None
        if accelerator.is_main_process:
            from dg_timm.training.checkpoints import find_fault

            fault = find_fault(place)
        fault = broadcast_object_list([fault])[0]
        if fault:
            raise ValueError(f"--resume {place}: {fault}")
    changed = arguments.differences(vars(args), read_args(place))
    if changed:
        raise ValueError(
            f"{place} was written with other options, so that going on would be another training:\n  " + "\n  ".join(changed)
            + "\nGive the same options, or start afresh from its weights: --initial-checkpoint in another --output"
        )  # fmt: skip
    return place


def train(args: argparse.Namespace, accelerator: Accelerator, stop: StopRequest) -> None:
    output = Path(args.output)
    split = optimization.split_batch(args.batch_size, accelerator.num_processes, args.micro_batch)
    if (args.mixup or args.cutmix) and split.micro_batch % 2:
        raise ValueError(f"mixup pairs the images of a batch: the micro-batch must be even, not {split.micro_batch}")
    if args.resume is None and (output / "args.yaml").exists():
        raise ValueError(f"{output} holds a run already: go on with --resume auto, or give another --output")

    with accelerator.local_main_process_first():
        splits = load_data(args)
    names = splits.label_names
    if args.num_classes and args.num_classes < len(names):
        raise ValueError(f"--num-classes {args.num_classes} is fewer than the {len(names)} classes of {args.data}")
    num_classes = args.num_classes or len(names)
    label_names = names if num_classes == len(names) else None
    rows = splits.train.size if splits.train.size is not None and not args.epoch_size else args.epoch_size
    if rows is None:
        raise ValueError(f"{args.data} does not tell how many rows it has; give --epoch-size (the schedule needs it)")
    updates_per_epoch = -(-rows // split.images) if splits.train.streamed else rows // split.images

    set_seed(args.seed)
    network = build_network(args, num_classes, accelerator)
    transforms = make_transforms(args, network.data_config)
    val_batch = args.val_batch_size or split.micro_batch
    loader = make_loader(splits.train, args, transforms[0], names, split.micro_batch, accelerator, network.data_config, training=True)
    val_loader = make_loader(splits.test, args, transforms[1], names, val_batch, accelerator, network.data_config, training=False)
    optimizer, schedule, epochs = build_optimization(args, network.model, updates_per_epoch)
    model, optimizer = accelerator.prepare(network.model, optimizer)
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    ema = None
    if args.ema_decay is not None:
        ema = ModelEmaV3(plain, decay=args.ema_decay, use_warmup=args.ema_warmup)
    set_seed(args.seed, device_specific=True)  # from here on each process draws its own dropout

    def write_checkpoint_config(of: nn.Module, folder: Path) -> None:
        write_config(of, folder / "config.json", label_names=label_names, data_config=network.data_config)

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
                candidate, val_loader.epoch(0), accelerator, channels_last=args.channels_last, stop=lambda: stop.signal is not None
            )
            row |= {f"{prefix}_loss": figures.loss, f"{prefix}_top1": figures.top1}
            row |= {f"{prefix}_top5": figures.top5} if num_classes > 5 else {}
            best = max(best, figures.top1)
        if val_loader.skipped:
            row["eval_skipped_images"] = int(agreement.sum(val_loader.skipped)[0])
            val_loader.skipped = 0
        sample = next(iter(val_loader.epoch(0)), None) if graph_stages(plain) else None
        if sample is not None:
            row |= graph_statistics(plain, sample.images[sample.weights > 0].to(accelerator.device))
        return row | {"metric": best}

    def export(row: Row) -> None:
        """The best network so far (the average of the weights, where that is better) in Hub layout."""
        use_ema = ema is not None and float(row["ema_top1"]) >= float(row["eval_top1"])
        save_model(
            ema.module if use_ema and ema else plain,
            output / "model",
            label_names=label_names,
            data_config=network.data_config,
            dataset=Path(args.data).name if Path(args.data).exists() else args.data,
            accuracy=float(row["ema_top1" if use_ema else "eval_top1"]),
            training=describe(args, row, network.random, use_ema),
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
        accelerator, model, optimizer, schedule, ema, loader, network.objective, evaluate, checkpoints, report, agreement, stop,
        plan, on_epoch, export,
    )  # fmt: skip
    place = find_start(args, accelerator, checkpoints)
    checkpoints.clean()
    position = None
    if place is not None:
        position = trainer.resume(place)
        accelerator.print(f"going on from {place}: epoch {trainer.progress.epoch + 1}, update {trainer.progress.update}")
    report.begin(vars(args), trackers=bool(args.report_to))
    accelerator.print(
        f"{args.model}: {len(network.learning)} tensors learn; {rows} images, {num_classes} classes; {split.images} images an update "
        f"({split.micro_batch} x {split.accumulation} x {split.processes} processes); {epochs} epochs of {updates_per_epoch} updates"
    )
    try:
        trainer.run(position)
    finally:
        accelerator.end_training()
    progress = trainer.progress
    accelerator.print(f"best: {progress.best_metric:.2f} % in epoch {progress.best_epoch}; {output / 'model'} holds it")


def save_model(model: nn.Module, folder: Path, **card: Any) -> None:
    if graph_stages(model):
        dg_timm.save_pretrained(model, folder, overwrite=True, **card)
        return
    folder.mkdir(parents=True, exist_ok=True)  # a static network's card is timm's business
    beside = folder / ".saving"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
    write_config(model, beside / "config.json", label_names=card["label_names"], data_config=card["data_config"])
    for file in beside.iterdir():
        file.replace(folder / file.name)
    beside.rmdir()


def describe(args: argparse.Namespace, row: Row, random: bool, ema: bool) -> str:
    """A sentence for the card."""
    start = "from scratch" if random else f"from {args.initial_checkpoint and Path(args.initial_checkpoint).name or 'the published weights'}"
    parts = [f"{start}, {row['epoch']} of {args.epochs} epochs, {args.opt}, learning rate {args.lr:g}, batch {args.batch_size}, seed {args.seed}"]
    parts += [f"distilled from {Path(args.distill).name}"] if args.distill else []
    parts += ["average of the weights"] if ema else []
    return "; ".join(parts) + "; by train_scripts/train.py."


def main() -> int:
    args = parse()
    stop = StopRequest()
    with stop.listening():
        try:
            accelerator = make_accelerator(
                mixed_precision=args.mixed_precision, compile=args.compile, trackers=args.report_to, folder=Path(args.output)
            )
            if args.dry_run:
                if accelerator.is_main_process:
                    dry_run(args, accelerator)
            else:
                train(args, accelerator, stop)
        except Stopped as stopped:
            accelerator.print(f"{stopped}. Go on with:\n  {shlex.join(['python', *resuming(sys.argv)])}")
            return 128 + stopped.signal
        except NonFiniteLoss as error:
            accelerator.print(f"error: {error}. Its last good checkpoint is kept; lower --lr, or add --warmup-epochs or --clip-grad", file=sys.stderr)
            return 1
        except (ValueError, OSError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
    return 0


def resuming(argv: list[str]) -> list[str]:
    """The same command with --resume auto."""
    kept = [token for k, token in enumerate(argv) if token != "--resume" and (k == 0 or argv[k - 1] != "--resume") and not token.startswith("--resume=")]
    return [*kept, "--resume", "auto"]


if __name__ == "__main__":
    sys.exit(main())
