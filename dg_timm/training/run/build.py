"""From options to data, network and optimizer: what train.py, validate.py and a dry run build alike."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar

import torch
from accelerate import Accelerator
from timm.data import Mixup, create_transform, resolve_data_config
from timm.layers import convert_sync_batchnorm
from torch import nn

from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.budget.start import make_skippable, raise_thresholds
from dg_timm.training.data.loading import Collate, Images, IndexOrder, Loader, Share, StreamOrder
from dg_timm.training.data.sources import Split, Splits, load_splits
from dg_timm.training.loop import optimization
from dg_timm.training.loop.objective import Classification, CostTarget
from dg_timm.training.run import networks as models


def load_data(args: argparse.Namespace) -> Splits:
    names = Path(args.label_names).read_text().splitlines() if args.label_names else None
    splits = load_splits(
        args.data,
        val_source=args.val_data,
        train_split=args.train_split,
        val_split=args.val_split,
        image_key=args.image_key,
        label_key=args.label_key,
        label_names=names,
        num_classes=args.num_classes,
        streaming=args.streaming,
    )
    return splits._replace(
        train=limit(splits.train, args.train_limit, "--train-limit"),
        test=limit(splits.test, args.val_limit, "--val-limit"),
    )


AnySplit = TypeVar("AnySplit", bound=Any)  # of images with labels, or with boxes


def limit(split: AnySplit, size: Optional[int], option: str) -> AnySplit:
    """A fixed random choice of ``size`` rows (of the data, not of the run: every seed gets the same)."""
    if size is None:
        return split
    if split.size is None or split.streamed:
        raise ValueError(f"{option} can't choose among the rows of a stream")
    chosen = torch.randperm(split.size, generator=torch.Generator().manual_seed(0))[:size]
    chosen_rows: AnySplit = split.choose(sorted(chosen.tolist()))
    return chosen_rows


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
                + (
                    "each reads them all, and keeps its part"
                    if shards < share.processes
                    else "some will wait for others"
                )
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
    images = Images(
        split, transform, label_names, channels=data_config["input_size"][0], seed=args.seed if random else None
    )
    return Loader(
        order,
        images,
        Collate(batch_size, data_config["input_size"]),
        workers=args.workers,
        pin_memory=accelerator.device.type == "cuda",
        on_bad_image=args.on_bad_image,
        report=lambda line: print(line, flush=True),
    )


def make_transforms(args: argparse.Namespace, data_config: dict[str, Any]) -> tuple[Any, Any]:
    test = create_transform(**data_config)
    if not args.augment:
        return test, test
    try:
        return _training_transform(args, data_config), test
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"timm can't make this augmentation (--auto-augment {args.auto_augment}): {error!r}"
        ) from error


def _training_transform(args: argparse.Namespace, data_config: dict[str, Any]) -> Any:
    return create_transform(
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


class Network(NamedTuple):
    model: Any  # a timm model
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
    if args.head_init_scale != 1 and not own_classifier:
        models.scale_classifier(model, args.head_init_scale)
    fixed = args.fix_thresholds or args.target_cost is not None  # gates move weights, not thresholds
    learning = models.freeze(model, args.freeze, not own_classifier, thresholds=fixed)
    data_config = data_config_of(model, args)
    teacher = None
    if args.distill not in (None, "none"):
        teacher = models.create_teacher(
            args.distill, model, args.model, not own_classifier, in_chans=args.in_chans, **args.model_kwargs
        )
        teacher = teacher.to(accelerator.device)
    if args.skippable:  # a teacher is made of the plain identity, above
        make_skippable(model)
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
    loaded = args.pretrained or args.initial_checkpoint or models.names_weights(args.model)
    return Network(model, objective, data_config, learning, not loaded)


def with_cost_target(args: argparse.Namespace, network: Network, updates: int) -> Any:
    """The objective of a network; with --target-cost also a price on its cost. ``updates`` of the whole run."""
    if args.target_cost is None:
        return network.objective
    if args.compile:
        raise ValueError("--target-cost looks into the graph as it runs, which --compile hides; leave one of them out")
    expected = ExpectedCost(network.model, network.data_config["input_size"])
    raise_thresholds(network.model)
    return CostTarget(
        network.objective,
        expected,
        target=args.target_cost,
        weight=args.cost_weight,
        ramp=round(args.cost_ramp * updates),
        noise=args.cost_noise,
        quiet=round(args.cost_quiet * updates),
        seed=args.seed,
    )


def data_config_of(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Preprocessing: the model's own, where the options do not say otherwise."""
    given = {key: getattr(args, key) for key in ("mean", "std", "interpolation", "crop_pct")}
    if args.image_size:
        given["input_size"] = (model.in_chans, args.image_size, args.image_size)
    channels = model.in_chans
    for key in ("mean", "std"):
        if given[key] is not None and len(given[key]) not in (1, channels):
            raise ValueError(f"--{key} has {len(given[key])} values for {channels} channels")
    config: dict[str, Any] = resolve_data_config({k: v for k, v in given.items() if v is not None}, model=model)
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def build_optimization(
    args: argparse.Namespace, model: nn.Module, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any, int]:
    groups = optimization.parameter_groups(
        model, weight_decay=args.weight_decay, layer_decay=args.layer_decay, graph_lr_scale=args.graph_lr_scale
    )
    lr = optimization.scaled_lr(args.lr, args.batch_size, args.lr_base_batch, args.lr_base_scale)
    optimizer = optimization.create_optimizer(
        groups, opt=args.opt, lr=lr, momentum=args.momentum, options=args.opt_kwargs
    )
    keys = ("sched", "epochs", "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs", "decay_rate", "decay_epochs",
            "decay_milestones", "warmup_prefix")  # fmt: skip
    options = {key: getattr(args, key) for key in keys}
    if args.updates is None:
        if args.warmup_updates is not None or args.milestone_updates is not None:
            raise ValueError("--warmup-updates and --milestone-updates belong to --updates; give it, too")
        schedule, epochs = optimization.create_schedule(optimizer, updates_per_epoch=updates_per_epoch, **options)
        return optimizer, schedule, epochs
    of_epochs = {"cooldown_epochs": 0, "decay_epochs": None, "warmup_epochs": 0.0, "warmup_prefix": False}
    given = [f"--{key.replace('_', '-')}" for key, default in of_epochs.items() if options[key] != default]
    if given:
        raise ValueError(
            f"{', '.join(given)}: counted in epochs, and --updates counts in updates; leave one of them out"
        )
    # an update is the schedule's epoch
    options |= dict(
        epochs=args.updates,
        warmup_epochs=float(args.warmup_updates or 0),
        decay_milestones=args.milestone_updates or [args.updates],
    )
    schedule, _ = optimization.create_schedule(optimizer, updates_per_epoch=1, **options)
    return optimizer, schedule, -(-args.updates // updates_per_epoch)
