"""The training of a classifier, as a task of the training loop."""

import argparse
import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from dg_timm._errors import BadValue
from dg_timm._hardware import describe_hardware
from dg_timm._version import __version__
from dg_timm.graph.stage import graph_stages
from dg_timm.hub.card import Accuracy, Card
from dg_timm.hub.config import write_config
from dg_timm.training.data.size_schedule import SizeSchedule
from dg_timm.training.data.splits import Splits
from dg_timm.training.data.summary import describe_data
from dg_timm.training.loop.objective import Losses
from dg_timm.training.loop.optimization import FOREACH_OPTIMIZERS, BatchSplit, scaled_lr
from dg_timm.training.loop.report import Metric, Row
from dg_timm.training.run.build import Network, build_network
from dg_timm.training.run.build_data import epochs_of, load_data, make_loader, make_transforms
from dg_timm.training.run.classes import names_to_train
from dg_timm.training.run.data_options import labeling_of_options
from dg_timm.training.run.fine_tuning import save_model
from dg_timm.training.run.held_out import HeldOut
from dg_timm.training.run.networks import create, read_config
from dg_timm.training.run.targets import (
    conclude,
    conclude_cascade,
    describe_cascade,
    describe_gates,
    prefix_of,
    value_of,
    with_cost_target,
)
from dg_timm.training.run.task import TrainingTask

VAL_BATCH = 64  # not that of training, which depends on the processes: rounding would, too


def build_classification(args: argparse.Namespace, accelerator: Accelerator, split: BatchSplit) -> TrainingTask:
    """Build data, network, loss and evaluation of a classification; write nothing.

    Raises:
        BadValue: naming the option that can't be used.
    """
    if args.fsdp:
        check_sharding(args, accelerator)
    if (args.mixup or args.cutmix) and split.micro_batch % 2:
        raise BadValue(f"mixup pairs the images of a batch: the micro-batch must be even, not {split.micro_batch}")
    with accelerator.local_main_process_first():
        splits = load_data(args, labeling=labeling_of_options(args))
    num_classes, rows = _count_classes(args, splits), _count_rows(args, splits)
    accelerator.print(describe_data(splits, args.data), flush=True)
    set_seed(args.seed)
    network = build_network(args, num_classes, accelerator)
    accelerator.print(describe_start(network))
    splits = splits._replace(label_names=names_to_train(network.model, splits.label_names, accelerator.print))
    updates_per_epoch = -(-rows // split.images) if splits.train.streamed else rows // split.images
    transforms = _make_transforms(args, network, updates_per_epoch, accelerator)
    names, config = splits.label_names, network.data_config
    loader = make_loader(
        splits.train, args, transforms[0], names, split.micro_batch, accelerator, config, training=True
    )
    val_batch = args.val_batch_size or VAL_BATCH
    val_loader = make_loader(splits.test, args, transforms[1], names, val_batch, accelerator, config, training=False)
    objective: Callable[..., Losses] = network.objective
    aim = None
    if args.target_cost is not None:
        updates = args.updates or args.epochs * updates_per_epoch
        wanted = network.is_conversion if args.cascade is None else args.cascade
        cascades = wanted and network.objective.labeling.task == "single" and num_classes > 1
        priced, aim = with_cost_target(args, objective, network.model, config["input_size"], updates, cascades=cascades)
        accelerator.print(describe_gates(network.model, priced.expected.minimum))
        objective = priced
    evaluation = HeldOut(args, network, val_loader, accelerator, aim)
    output, metric = _Output(args, network, splits, evaluation), evaluation.figures.metric

    def on_epoch(epoch: int) -> None:
        mixup = network.objective.mixup
        if mixup is not None and args.mixup_off_epoch:
            mixup.mixup_enabled = epoch < args.mixup_off_epoch

    return TrainingTask(
        model=network.model,
        objective=objective,
        loader=loader,
        val_loader=val_loader,
        updates_per_epoch=updates_per_epoch,
        evaluate=evaluation.evaluate,
        metric=metric if aim is None else value_of(metric, aim),
        observe=evaluation.observe,
        write_config=output.write_config,
        export=output.export,
        images=f"{rows} images, {num_classes} classes",
        conclude=output.conclude,
        on_epoch=on_epoch,
        fixed_norms=args.freeze_norm,
        fsdp=args.fsdp,
    )


def check_sharding(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Refuse what ``--fsdp`` can't do.

    Raises:
        BadValue: naming the option that does not go with it.
    """
    unfit = {
        f"--opt {args.opt}": args.opt not in FOREACH_OPTIMIZERS,
        "--mixed-precision fp16": args.mixed_precision == "fp16",
        "--clip-mode agc": args.clip_grad is not None and args.clip_mode == "agc",
        "--compile": args.compile,
    }
    named = [option for option, is_unfit in unfit.items() if is_unfit]
    if named:
        raise BadValue(
            f"--fsdp does not go with {', '.join(named)}; it takes --opt {', '.join(FOREACH_OPTIMIZERS)}, "
            "--mixed-precision bf16, --clip-mode norm or value"
        )
    if accelerator.num_processes == 1:
        raise BadValue(
            "--fsdp shares a network out over processes, and there is one: start it by torchrun or accelerate"
        )


def describe_start(network: Network) -> str:
    """Say from what a training starts: graphs, weights, and whether the classifier is new."""
    if network.random:
        start = "from random weights"
    elif network.new_classifier:
        start = f"from trained weights, with a new classifier of {network.model.num_classes} classes"
    else:
        start = "from trained weights, with their classifier"
    stages = graph_stages(network.model)
    kind = f"{len(stages)} graphs ({', '.join(stages)})" if stages else "static"
    return f"{kind}; {start}"


def _make_transforms(
    args: argparse.Namespace, network: Network, updates_per_epoch: int, accelerator: Accelerator
) -> tuple[Any, Any]:
    """Make the transforms for training and for evaluation, and say which sizes the first one goes through."""
    epochs = epochs_of(args, updates_per_epoch)
    transforms = make_transforms(args, network.model, network.data_config, epochs)
    if isinstance(transforms[0], SizeSchedule):
        accelerator.print(transforms[0].describe())
    return transforms


def _count_classes(args: argparse.Namespace, splits: Splits) -> int:
    known = len(splits.label_names)
    if args.num_classes and args.num_classes < known:
        raise BadValue(f"--num-classes {args.num_classes} is fewer than the {known} classes of {args.data}")
    return int(args.num_classes or known)


def _count_rows(args: argparse.Namespace, splits: Splits) -> int:
    rows = (splits.train.streamed and args.epoch_size) or splits.train.size
    if rows is None:
        raise BadValue(f"{args.data} does not tell how many rows it has; give --epoch-size (the schedule needs it)")
    return int(rows)


class _Output:
    """What a run writes of its network, with the names of its classes."""

    def __init__(self, args: argparse.Namespace, network: Network, splits: Splits, evaluation: HeldOut) -> None:
        self.args, self.network, self.images, self.evaluation = args, network, splits.test.size, evaluation
        complete = network.objective.num_classes == len(splits.label_names)
        self.label_names = splits.label_names if complete else None

    def write_config(self, network: nn.Module, folder: Path) -> None:
        """Write the config.json of a checkpoint."""
        write_config(
            network, folder / "config.json", label_names=self.label_names, data_config=self.network.data_config
        )

    def export(self, best: nn.Module, row: Row, epochs: int, average: bool) -> None:
        """Write the best network in Hub layout."""
        self.evaluation.keep_curve(best)
        self._save(best, row, epochs, average, self.images, {})

    def conclude(self, row: Row, epochs: int) -> str | None:
        """Say whether the costs that were aimed at were reached; of a cascade, choose and save it first."""
        aim, evaluation = self.evaluation.aim, self.evaluation
        if aim is None or aim.cascade is None or not evaluation.accelerator.is_main_process:
            return conclude(aim, row)
        best = create(str(Path(self.args.output) / "model")).eval().to(evaluation.accelerator.device)
        try:
            choice, images = evaluation.choose_cascade(best)
        except BadValue as error:
            return f"cost aimed at: {aim.cascade:g} NOT reached: {error}"
        prefix, line = prefix_of(row), describe_cascade(choice)
        made = {"Cascade": f"{line}, chosen on the images that it is judged on"}
        self._save(best, row | {f"{prefix}_top1": choice.top1}, epochs, prefix == "ema", images, made)
        return conclude_cascade(aim, choice, images)

    def _save(
        self, best: nn.Module, row: Row, epochs: int, average: bool, images: int | None, made: dict[str, str]
    ) -> None:
        metric = self.evaluation.figures.metric
        card = make_card(self.args, row, epochs, self.network.random, average, images, metric)
        save_model(
            best,
            Path(self.args.output) / "model",
            label_names=self.label_names,
            data_config=self.network.data_config,
            card=replace(card, made={**card.made, **made}),
        )


def named_source(source: str) -> str:
    """Name weights for a visitor of the card: by what their folder says that they are, not by the name of a file."""
    folder = Path(source.removeprefix("local-dir:"))
    file, folder = folder, (folder.parent if folder.is_file() else folder)
    with contextlib.suppress(BadValue):
        place = folder if (folder / "config.json").exists() else folder / "model"
        return f"earlier weights of {read_config(place)['architecture']}"
    generic = file.stem in ("model", "pytorch_model", "weights")
    return f"weights in {folder.name}/{file.name}" if generic and file.is_file() else file.name


def make_card(
    args: argparse.Namespace, row: Row, epochs: int, random: bool, ema: bool, images: int | None, metric: Metric
) -> Card:
    """Write what the card says of the training, and only what this run measured.

    Args:
        args: options of the run.
        row: of the summary, of the epoch whose network is saved.
        epochs: that the run was to have.
        random: whether the network started from random weights.
        ema: whether the average of the weights is saved.
        images: number of images that were evaluated; None if unknown.
        metric: the figure of the row that the card shows.
    """
    path = Path(args.data)
    name = path.name if path.exists() else args.data
    source = "from the published weights"
    if not args.pretrained:
        source = f"from {named_source(args.initial_checkpoint or args.model)}"
    lr = scaled_lr(args.lr, args.batch_size, args.lr_base_batch, args.lr_base_scale)
    made = {
        "Training": f"{'from scratch' if random else source}, by `train_scripts/train.py` of dg_timm {__version__}",
        "Recipe": f"{Path(args.recipe or 'none').stem}; {row['epoch']} of {epochs} epochs, {args.opt}, "
        f"learning rate {lr:g}, batch {args.batch_size}" + (", average of the weights" if ema else ""),
    }
    if args.distill not in (None, "none"):
        made["Distilled from"] = (
            "the static network it was converted from" if args.distill == "static" else named_source(args.distill)
        )
    made |= {"Hardware": describe_hardware(), "Seed": str(args.seed)}
    on_hub = name if re.fullmatch(r"[\w.-]+/[\w.-]+", args.data) and not path.exists() else None
    measured = Accuracy(
        dataset=name,
        value=float(row[f"{'ema' if ema else 'eval'}_{metric.name}"]),
        metric=metric.title.removesuffix(" (%)"),
        split=args.val_split or "held out",  # which one it was depends on the data set
        images=images,
        spread="one seed, the best epoch on these images",
        hub_dataset=on_hub,
    )
    return Card(datasets=[on_hub] if on_hub else [], made=made, accuracies=[measured])
