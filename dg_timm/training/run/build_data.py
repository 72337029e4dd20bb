"""From options to splits, preprocessing and loaders."""

import argparse
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from timm.data import create_transform, resolve_data_config
from torch import nn

from dg_timm._errors import BadValue
from dg_timm.analysis.counting import complexity
from dg_timm.hub.labeling import SINGLE, Labeling
from dg_timm.training.data.images import Collate, Images
from dg_timm.training.data.loader import Loader
from dg_timm.training.data.samplers import MapSampler, Rank, StreamSampler
from dg_timm.training.data.several import describe_labels
from dg_timm.training.data.size_schedule import SizeSchedule
from dg_timm.training.data.sources import load_splits
from dg_timm.training.data.splits import Split, Splits

AnySplit = TypeVar("AnySplit", bound=Any)  # of images with labels, or with boxes


def load_data(
    args: argparse.Namespace,
    cache_dir: Path | None = None,
    *,
    only_evaluate: bool = False,
    labeling: Labeling = SINGLE,
) -> Splits:
    """Load both splits that the options name.

    Args:
        args: options of :func:`dg_timm.training.run.data_options.add_data_options`; where labels are more than a
            single class, also of :func:`dg_timm.training.run.data_options.add_task_options`.
        cache_dir: folder for the copy that ``datasets`` makes; by default its own cache.
        only_evaluate: take all rows of data whose only splits are held out, and none to train on.
        labeling: what labels are for.

    Raises:
        BadValue: naming the option, file, split or column that can't be used.
    """
    splits = load_splits(
        args.data,
        val_source=args.val_data,
        train_split=args.train_split,
        val_split=args.val_split,
        image_key=args.image_key,
        label_key=args.label_key,
        label_names=_read_names(args.label_names),
        num_classes=args.num_classes,
        streaming=args.streaming,
        cache_dir=cache_dir,
        skip_bad_rows=args.on_bad_image == "skip",
        only_evaluate=only_evaluate,
        labeling=labeling,
        label_separator=None if labeling.task == "single" else args.label_separator,
    )
    splits = splits._replace(
        train=limit(splits.train, args.train_limit, "--train-limit") if splits.train.size != 0 else splits.train,
        test=limit(splits.test, args.val_limit, "--val-limit"),
    )
    if labeling.task != "multilabel":
        return splits
    return splits._replace(remarks=tuple(describe_labels(splits.train, splits.test, splits.label_names)))


def _read_names(file: str | None) -> list[str] | None:
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"--label-names {file} can't be read: {error}") from error


def limit(split: AnySplit, size: int | None, option: str) -> AnySplit:
    """Choose ``size`` rows at random, the same ones for every seed of a run.

    Raises:
        BadValue: for a stream, naming ``option``.
    """
    if size is None:
        return split
    if split.size is None or split.streamed:
        raise BadValue(f"{option} can't choose among the rows of a stream")
    chosen = torch.randperm(split.size, generator=torch.Generator().manual_seed(0))[:size]
    chosen_rows: AnySplit = split.select(sorted(chosen.tolist()))
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
    """Make the loader of this process.

    Args:
        split: to read.
        args: options of a training.
        transform: of the images.
        label_names: one name for each class.
        batch_size: number of images in a batch of this process.
        accelerator: tells which process this is.
        data_config: preprocessing, as timm describes it.
        training: shuffle and augment, and leave out the rows that fill no whole update.

    Raises:
        BadValue: for options that do not go with the split.
    """
    rank = Rank(accelerator.process_index, accelerator.num_processes)
    random = training and args.augment
    seed = args.seed if random else None
    make_sampler = _stream_sampler if split.streamed else _map_sampler
    return Loader(
        make_sampler(split, args, batch_size, rank, training),
        Images(split, transform, label_names, channels=data_config["input_size"][0], seed=seed),
        Collate(batch_size, data_config["input_size"], None if split.form.kind == "class" else len(label_names)),
        workers=args.workers,
        pin_memory=accelerator.device.type == "cuda",
        on_bad_image=args.on_bad_image,
        report=lambda line: print(line, flush=True),
    )


def _map_sampler(split: Split, args: argparse.Namespace, batch_size: int, rank: Rank, training: bool) -> MapSampler:
    assert split.size is not None
    if training and split.size < args.batch_size:
        raise BadValue(f"--batch-size {args.batch_size} is more than the {split.size} images of {split.name}")
    return MapSampler(
        split.size,
        batch_size,
        rank,
        shuffle=training,
        seed=args.seed,
        multiple=args.batch_size if training else 1,
        repeats=args.aug_repeats if training else 1,
    )


def _stream_sampler(
    split: Split, args: argparse.Namespace, batch_size: int, rank: Rank, training: bool
) -> StreamSampler:
    if training and args.aug_repeats > 1:
        raise BadValue("--aug-repeats needs a data set that is not streamed")
    shards = split.rows.num_shards
    if training and rank.process == 0 and shards % rank.world_size:
        few = shards < rank.world_size
        what = "each reads them all, and keeps its part" if few else "some will wait for others"
        print(f"{split.name} has {shards} shards for {rank.world_size} processes: {what}", flush=True)
    return StreamSampler(split.rows, batch_size, rank, shuffle=training, seed=args.seed, buffer=args.shuffle_buffer)


def epochs_of(args: argparse.Namespace, updates_per_epoch: int) -> int:
    """Return how many epochs a training has, also one that is counted in updates."""
    return args.epochs if args.updates is None else -(-args.updates // max(updates_per_epoch, 1))


def make_transforms(
    args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any], epochs: int
) -> tuple[Any, Any]:
    """Make timm's transforms of images for training and for evaluation.

    Args:
        args: options of a training.
        model: that takes the images.
        data_config: preprocessing, as timm describes it.
        epochs: of the training, over which ``--size-schedule`` goes.

    Raises:
        BadValue: if timm can't make the augmentation, or the network does not take the sizes.
    """
    test = create_transform(**data_config)
    if args.size_schedule is None:
        return _make_training_transform(args, data_config), test
    channels = data_config["input_size"][0]

    def make(size: int) -> Any:
        try:
            complexity(model, (channels, size, size))
        except (RuntimeError, AssertionError) as error:  # of any layer: too small, or of a fixed size
            reason = str(error).splitlines()[0]
            raise BadValue(f"--size-schedule: {args.model} can't take images of {size} pixels ({reason})") from error
        return _make_training_transform(args, {**data_config, "input_size": (channels, size, size)})

    return SizeSchedule(args.size_schedule, epochs, make), test


def _make_training_transform(args: argparse.Namespace, data_config: dict[str, Any]) -> Any:
    if not args.augment:
        return create_transform(**data_config)
    try:
        return _augmentation(args, data_config)
    except (AssertionError, KeyError, ValueError) as error:
        raise BadValue(f"timm can't make this augmentation (--auto-augment {args.auto_augment}): {error!r}") from error


def _augmentation(args: argparse.Namespace, data_config: dict[str, Any]) -> Any:
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


def data_config_of(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return the preprocessing that a model has, changed where the options say so, as timm describes it.

    Raises:
        BadValue: for a mean or std of another number of channels.
    """
    given = {key: getattr(args, key) for key in ("mean", "std", "interpolation", "crop_pct")}
    if args.image_size:
        given["input_size"] = (model.in_chans, args.image_size, args.image_size)
    channels = model.in_chans
    for key in ("mean", "std"):
        if given[key] is not None and len(given[key]) not in (1, channels):
            raise BadValue(f"--{key} has {len(given[key])} values for {channels} channels")
    config: dict[str, Any] = resolve_data_config({k: v for k, v in given.items() if v is not None}, model=model)
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config
