"""From options to data, batches and a detector."""

import argparse
import importlib.util
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm

from dg_timm._errors import BadValue, MissingPackage
from dg_timm.detection.backbone import freeze_backbone
from dg_timm.detection.data.annotations import DataOptions, load_detection
from dg_timm.detection.data.boxes import Categories, DetectionSplit, DetectionSplits
from dg_timm.detection.data.loading import Augmentation, DetectionCollate, DetectionImages, make_transform
from dg_timm.detection.data.summary import describe_detection_data
from dg_timm.detection.detectors import DetectorConfig, create_detector
from dg_timm.training.data.loader import Loader
from dg_timm.training.data.samplers import MapSampler, Rank
from dg_timm.training.run import networks
from dg_timm.training.run.build_data import limit
from dg_timm.training.run.fine_tuning import freeze_thresholds
from dg_timm.training.run.targets import compile_blocks, compiles_whole

VAL_BATCH = 1  # an image alone is not padded, so its detections don't depend on another image's size
_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_extras(args: argparse.Namespace) -> None:
    """Raise MissingPackage, before an epoch is spent, if what evaluates or draws is not installed."""
    for name in ("torchmetrics", "pycocotools", *(["matplotlib"] if args.pictures else [])):
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(f"{name} is not installed: pip install 'dg-timm[detect]'")


def load_data(args: argparse.Namespace, accelerator: Accelerator, known: Categories | None = None) -> DetectionSplits:
    """Load both splits.

    Args:
        args: the options.
        accelerator: its main process reads first, so that the others find a filled cache.
        known: the classes of a detector that is only evaluated; nothing is then loaded to train on.

    Raises:
        BadValue: the data can't be used (:func:`dg_timm.detection.data.annotations.load_detection`), or a split has no
            box.
    """
    options = {key: getattr(args, key) for key in DataOptions._fields if key != "val_source"}
    with accelerator.local_main_process_first():
        splits = load_detection(args.data, DataOptions(val_source=args.val_data, **options), known=known)
    splits = splits._replace(
        train=splits.train if known else limit(splits.train, args.train_limit, "--train-limit"),
        test=limit(splits.test, args.val_limit, "--val-limit"),
    )
    if known is None and splits.train.boxes == 0:
        raise BadValue(f"{splits.train.name} has no box to learn from")
    if splits.test.boxes == 0:
        raise BadValue(f"{splits.test.name} has no box to find")
    accelerator.print(describe_detection_data(splits, args.data), flush=True)
    return splits


def make_detection_loader(
    split: DetectionSplit, args: argparse.Namespace, batch_size: int, accelerator: Accelerator, *, training: bool
) -> Loader:
    """Make the batches of this process.

    Args:
        split: the images.
        args: the options.
        batch_size: the number of images in a batch.
        accelerator: tells which process this is.
        training: shuffle and augment, and leave out what does not fill an update.

    Raises:
        BadValue: the split has fewer images than an update.
    """
    if training and split.size < args.batch_size:
        raise BadValue(f"--batch-size {args.batch_size} is more than the {split.size} images of {split.name}")
    sampler = MapSampler(
        split.size,
        batch_size,
        Rank(accelerator.process_index, accelerator.num_processes),
        shuffle=training,
        seed=args.seed,
        multiple=args.batch_size if training else 1,
    )
    augmentation = Augmentation(**{key: getattr(args, key) for key in Augmentation._fields})
    is_random = training and args.augment
    return Loader(
        sampler,
        DetectionImages(split, make_transform(augmentation if is_random else None), args.seed if is_random else None),
        DetectionCollate(batch_size),
        workers=args.workers,
        pin_memory=accelerator.device.type == "cuda",
        on_bad_image=args.on_bad_image,
        report=lambda line: print(line, flush=True),
    )


def make_eval_loader(split: DetectionSplit, args: argparse.Namespace, accelerator: Accelerator) -> Loader:
    """Make this process's batches of the split to evaluate on."""
    return make_detection_loader(split, args, args.val_batch_size or VAL_BATCH, accelerator, training=False)


def build_detector(args: argparse.Namespace, categories: Categories, accelerator: Accelerator) -> Any:
    """Create the detector to train, on the CPU, with what must not learn frozen.

    Raises:
        BadValue: the detector or its backbone can't be built, or does not offer an option.
    """
    kwargs = args.model_kwargs
    if args.target_cost is not None and networks.is_dynamic(args.model):
        kwargs = {"gates": True} | kwargs
    detector = create_detector(
        args.detector,
        args.model,
        categories.names,
        categories.ids,
        DetectorConfig(
            min_size=tuple(args.min_size),
            max_size=args.max_size,
            fpn_channels=args.fpn_channels,
            anchor_size=args.anchor_size,
            roi_batch=args.roi_batch,
        ),
        pretrained=args.pretrained,
        initial_checkpoint=args.initial_checkpoint,
        model_kwargs=kwargs,
        seed=args.seed,
    )
    freeze_backbone(detector, args.freeze_levels, args.freeze_norm)
    if args.target_cost is not None:
        freeze_thresholds(detector)
    if args.sync_bn:
        if accelerator.device.type != "cuda":
            raise BadValue("--sync-bn needs GPUs")
        detector = convert_sync_batchnorm(detector)
    if args.grad_checkpointing:
        try:
            detector.backbone.body.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise BadValue(f"--grad-checkpointing: {args.model} does not offer it as a feature extractor") from error
    apply_run_options(detector, args)
    return detector


def apply_run_options(detector: Any, args: argparse.Namespace) -> None:
    """Set memory layout, precision and compilation of the backbone.

    The heads are left alone: their shapes depend on what is found, and they compute in float32.
    """
    backbone = detector.backbone
    if args.channels_last:
        detector.to(memory_format=torch.channels_last)
        backbone.layout = torch.channels_last
    backbone.precision = _PRECISIONS[args.mixed_precision]
    backbone.compiled = compiles_whole(args)
    if args.compile and args.target_cost is not None:
        compile_blocks(backbone.body)
