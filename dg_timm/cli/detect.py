"""Train a detector over any timm or dg_timm backbone through Accelerate, and evaluate it.

    python train_scripts/detect.py --recipe digits                        # minutes on two cores
    python train_scripts/detect.py --recipe bccd --data path/to/bccd --initial-checkpoint weights.safetensors
    torchrun --nproc_per_node 8 train_scripts/detect.py --recipe coco_1x --data path/to/coco --model dg_resnet50
    python train_scripts/detect.py --evaluate output/detect/model --data path/to/bccd --val-split test --output output/t
    python train_scripts/detect.py --recipe bccd ... --resume auto        # go on after any interruption

Faster R-CNN, RetinaNet or FCOS (--detector) with a feature pyramid, of torchvision. Data are COCO annotation files
beside images, or a data set with a column of objects. Options come from the recipe and then from the command line.
"""

import argparse
import csv
import importlib.util
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file
from timm.layers import convert_sync_batchnorm
from torch import nn

from dg_timm import set_execution
from dg_timm.detection import config as own_arguments
from dg_timm.detection.data.annotations import load_detection
from dg_timm.detection.data.boxes import Categories, DetectionSplit, DetectionSplits
from dg_timm.detection.data.loading import DetectionCollate, DetectionImages, make_transform
from dg_timm.detection.detectors import Options, create_detector, freeze_backbone, load_detector, write_detector_config
from dg_timm.detection.evaluation import AP, Detections, Precision, coco_results, evaluate_detector
from dg_timm.detection.objective import Detection
from dg_timm.detection.plot import detector_statistics, draw_detections
from dg_timm.graph.stage import graph_stages
from dg_timm.training.data.loading import IndexOrder, Loader, Share
from dg_timm.training.loop.distributed import Agreement, StopRequest
from dg_timm.training.loop.optimization import BatchSplit, split_batch
from dg_timm.training.run import arguments
from dg_timm.training.run.build import build_optimization, limit
from dg_timm.training.run.dry import print_plan
from dg_timm.training.run.report import Row, write_beside
from dg_timm.training.run.session import Task, check_unused, run, train

RECIPES = Path(__file__).parents[1] / "recipes" / "detection"
GRAPH_IMAGES = 8  # over which the graph's statistics are averaged after every epoch


def parse(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_run_options(parser)
    own_arguments.add_data_options(parser)
    own_arguments.add_augmentation_options(parser)
    own_arguments.add_detector_options(parser)
    arguments.add_optimization_options(parser)
    own_arguments.add_result_options(parser)
    parser.set_defaults(output=None)
    args = arguments.parse(parser, argv, RECIPES)
    if args.output is None and args.evaluate is None:
        args.output = "output/detect"
    return args


def load_data(
    args: argparse.Namespace, accelerator: Accelerator, known: Optional[Categories] = None
) -> DetectionSplits:
    """Both splits; or that to evaluate on alone, for a detector whose categories are known."""
    keys = ("train_split", "val_split", "train_annotations", "val_annotations", "image_folder", "box_format",
            "drop_bad_boxes", "skip_empty")  # fmt: skip
    with accelerator.local_main_process_first():
        options = {key: getattr(args, key) for key in keys}
        splits = load_detection(args.data, val_source=args.val_data, known=known, **options)
    for split in (splits.train, splits.test):
        if split.dropped:
            accelerator.print(f"{split.name}: left out {split.dropped} bad boxes")
    splits = splits._replace(
        train=splits.train if known else limit(splits.train, args.train_limit, "--train-limit"),
        test=limit(splits.test, args.val_limit, "--val-limit"),
    )
    if known is None and splits.train.boxes == 0:
        raise ValueError(f"{splits.train.name} has no box to learn from")
    if splits.test.boxes == 0:
        raise ValueError(f"{splits.test.name} has no box to find")
    return splits


def make_loader(
    split: DetectionSplit, args: argparse.Namespace, batch_size: int, accelerator: Accelerator, *, training: bool
) -> Loader:
    if training and split.size < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {split.size} images of {split.name}")
    order = IndexOrder(
        split.size,
        batch_size,
        Share(accelerator.process_index, accelerator.num_processes),
        shuffle=training,
        seed=args.seed,
        multiple=args.batch_size if training else 1,
    )
    random = training and args.augment
    keys = ("hflip", "vflip", "photometric", "crop", "zoom_out")
    transform = make_transform(augment=random, **{key: getattr(args, key) for key in keys})
    return Loader(
        order,
        DetectionImages(split, transform, args.seed if random else None),
        DetectionCollate(batch_size),
        workers=args.workers,
        pin_memory=accelerator.device.type == "cuda",
        on_bad_image=args.on_bad_image,
        report=lambda line: print(line, flush=True),
    )


def build_detector(args: argparse.Namespace, splits: DetectionSplits, accelerator: Accelerator) -> Any:
    options = Options(
        min_size=tuple(args.min_size),
        max_size=args.max_size,
        fpn_channels=args.fpn_channels,
        anchor_size=args.anchor_size,
        roi_batch=args.roi_batch,
    )
    detector = create_detector(
        args.detector,
        args.model,
        splits.categories.names,
        splits.categories.ids,
        options,
        pretrained=args.pretrained,
        initial_checkpoint=args.initial_checkpoint,
        model_kwargs=args.model_kwargs,
        seed=args.seed,
    )
    freeze_backbone(detector, args.freeze_levels, args.freeze_norm)
    if args.sync_bn:
        if accelerator.device.type != "cuda":
            raise ValueError("--sync-bn needs GPUs")
        detector = convert_sync_batchnorm(detector)
    if args.grad_checkpointing:
        try:
            detector.backbone.body.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ValueError(f"--grad-checkpointing: {args.model} does not offer it as a feature extractor") from error
    lay_out(detector, args)
    return detector


def lay_out(detector: Any, args: argparse.Namespace) -> None:
    """Memory layout, precision and compilation of the backbone; the heads depend on what is found, and stay precise."""
    backbone = detector.backbone
    if args.channels_last:
        detector.to(memory_format=torch.channels_last)
        backbone.layout = torch.channels_last
    backbone.precision = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
    backbone.compiled = args.compile


def check_extras(args: argparse.Namespace) -> None:
    """ImportError, before an epoch is spent, where what evaluates or draws is not installed."""
    for name in ("torchmetrics", "pycocotools", *(["matplotlib"] if args.pictures else [])):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{name} is not installed: pip install 'dg-timm[detect]'")


def build(args: argparse.Namespace, accelerator: Accelerator, split: BatchSplit) -> Task:
    """Data and detector; nothing is written."""
    check_extras(args)
    splits = load_data(args, accelerator)
    if args.layer_decay is not None:
        raise ValueError("--layer-decay is for classifiers: a feature extractor does not tell its layers")
    set_seed(args.seed)
    detector = build_detector(args, splits, accelerator)
    loader = make_loader(splits.train, args, split.micro_batch, accelerator, training=True)
    val_loader = make_loader(splits.test, args, args.val_batch_size or 1, accelerator, training=False)
    sample = []
    if accelerator.is_main_process and graph_stages(detector):
        sample = [row[0].to(accelerator.device) for row in val_loader.sample(GRAPH_IMAGES)]
    found: dict[nn.Module, tuple[Precision, list[Detections]]] = {}  # of the last evaluation, by network

    def evaluate(candidate: nn.Module, stopping: Callable[[], bool]) -> Row:
        found[candidate] = evaluate_detector(
            candidate, val_loader.epoch(0), splits.test, splits.categories, accelerator, stopping
        )
        return dict(found[candidate][0].overall)

    def export(best: nn.Module, row: Row, epochs: int, average: bool) -> None:
        output = Path(args.output)
        save_detector(best, output / "model")
        write_results(args, best, splits, *found[best], output)

    return Task(
        model=detector,
        objective=Detection(args.seed),
        loader=loader,
        val_loader=val_loader,
        updates_per_epoch=splits.train.size // split.images,
        evaluate=evaluate,
        metric=AP,
        observe=lambda candidate: detector_statistics(candidate, sample),
        write_config=write_detector_config,
        export=export,
        images=f"{splits.train.size} images, {splits.train.boxes} boxes of {len(splits.categories.names)} classes",
    )


def save_detector(detector: nn.Module, folder: Path) -> None:
    """model.safetensors and config.json; each is written beside its place and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".saving"
    beside.mkdir(exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in detector.state_dict().items()}
    save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
    write_detector_config(detector, beside)
    for file in beside.iterdir():
        file.replace(folder / file.name)
    beside.rmdir()


def write_results(
    args: argparse.Namespace,
    detector: nn.Module,
    splits: DetectionSplits,
    precision: Precision,
    found: list[Detections],
    output: Path,
) -> None:
    """predictions.json (COCO's format of results), per_class.csv, figures.json and detections.png."""
    output.mkdir(parents=True, exist_ok=True)
    write_beside(output / "predictions.json", json.dumps(coco_results(found, splits.test, splits.categories)) + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["category", "boxes", "AP", "AP50", "AP75"])
    writer.writerows([one.name, one.boxes, *(f"{value:.4f}" for value in one[2:])] for one in precision.classes)
    write_beside(output / "per_class.csv", table.getvalue())
    figures = {"split": splits.test.name, "images": len(found), **precision.overall}
    write_beside(output / "figures.json", json.dumps(figures, indent=1) + "\n")
    if args.pictures:
        step = max(len(found) // args.pictures, 1)
        draw_detections(
            detector,
            splits.test,
            found[::step][: args.pictures],
            splits.categories,
            output / "detections.png",
            least_score=args.picture_score,
        )


def evaluate_saved(args: argparse.Namespace, accelerator: Accelerator, stop: StopRequest) -> None:
    """Figures of a saved detector: a JSON line, a table by class; with --output what a run leaves of its best, too."""
    check_extras(args)
    if args.output is not None:
        check_unused(Path(args.output))
    detector = load_detector(args.evaluate)
    known = Categories(detector.config["label_names"], detector.config["category_ids"])
    splits = load_data(args, accelerator, known)
    lay_out(detector, args)
    detector.to(accelerator.device)
    if graph_stages(detector):
        set_execution(detector.backbone.body, args.execution)
    elif args.execution != "dense":
        raise ValueError(f"--execution {args.execution}: the backbone {detector.config['backbone']} is static")
    loader = make_loader(splits.test, args, args.val_batch_size or 1, accelerator, training=False)
    start = time.perf_counter()
    precision, found = evaluate_detector(
        detector, loader.epoch(0), splits.test, splits.categories, accelerator, lambda: stop.signal is not None
    )
    seconds = time.perf_counter() - start
    if Agreement().any(stop.signal is not None):  # what one process lacks makes the figures those of a part
        accelerator.print("stopped before all images were seen; nothing was written", file=sys.stderr)
        raise SystemExit(128 + int(stop.signal or 15))
    if not accelerator.is_main_process:
        return
    row = {"model": args.evaluate, "split": splits.test.name, "images": len(found), **precision.overall}
    print(json.dumps({**row, "seconds": round(seconds, 2)}), flush=True)
    width = max(len(one.name) for one in precision.classes)
    print(f"\n{'':{width}} {'boxes':>7} {'AP':>7} {'AP50':>7} {'AP75':>7}")
    for one in precision.classes:
        print(f"{one.name:{width}} {one.boxes:7} {one.AP:7.2f} {one.AP50:7.2f} {one.AP75:7.2f}")
    if args.output is not None:
        write_results(args, detector, splits, precision, found, Path(args.output))


def dry_run(args: argparse.Namespace, accelerator: Accelerator, split: BatchSplit) -> None:
    """Print what a run would do, and about how long an update takes."""
    splits = load_data(args, accelerator)
    detector = build_detector(args, splits, accelerator).to(accelerator.device)
    params = sum(p.numel() for p in detector.parameters())
    print(f"model        {args.detector} over {args.model}: {params / 1e6:.3f} M parameters, "
          f"{len(graph_stages(detector))} graphs")  # fmt: skip
    for part in (splits.train, splits.test):
        print(f"data         {part.name}: {part.size} images, {part.boxes} boxes")
    updates = splits.train.size // split.images
    optimizer, schedule, epochs = build_optimization(args, detector, updates)
    print_plan(args, split, optimizer, schedule, updates, epochs)
    loader = make_loader(splits.train, args, split.micro_batch, accelerator, training=True)
    batch = next(loader.epoch(0)).on(accelerator.device, torch.contiguous_format)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        loss = Detection(args.seed)(detector.train(), batch, 0).loss.mean()
        loss.backward()
        loss.item()
        times.append(time.perf_counter() - start)
    seconds = min(times[1:]) * split.accumulation
    print(f"time         about {seconds:.2f} s an update, {seconds * updates / 60:.1f} minutes an epoch on "
          f"{accelerator.device} (one batch, measured now; evaluation comes on top)")  # fmt: skip
    loader.close()


def main() -> int:
    args = parse()

    def work(accelerator: Accelerator, stop: StopRequest) -> None:
        if args.evaluate is not None:
            evaluate_saved(args, accelerator, stop)
            return
        split = split_batch(args.batch_size, accelerator.num_processes, args.micro_batch)
        if not args.dry_run:
            train(args, accelerator, stop, split, build)
        elif accelerator.is_main_process:
            dry_run(args, accelerator, split)

    return run(args, work)
