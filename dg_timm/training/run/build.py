"""From options to network, objective, optimizer and schedule: what a training and its dry run build alike."""

import argparse
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.scheduler.scheduler import Scheduler
from timm.task.distillation import DistillationTeacher
from torch import nn

from dg_timm._errors import BadValue
from dg_timm.conversion.state_dict import is_identity
from dg_timm.training.loop import optimization
from dg_timm.training.loop.objective import ClassificationObjective
from dg_timm.training.run import fine_tuning, networks
from dg_timm.training.run.build_data import data_config_of
from dg_timm.training.run.data_options import labeling_of_options
from dg_timm.training.run.targets import compile_blocks


class Network(NamedTuple):
    """A network that is ready to be trained.

    Attributes:
        model: a timm model on the CPU, with what must not learn frozen.
        objective: its loss, without a price on cost.
        data_config: preprocessing, as timm describes it.
        learning: names of the parameters that are not frozen.
        random: whether no weights were loaded.
        new_classifier: whether the classifier is random.
        is_conversion: whether it starts as the identity conversion of a trained static network; seen where a cost is
            aimed at.
    """

    model: Any
    objective: ClassificationObjective
    data_config: dict[str, Any]
    learning: list[str]
    random: bool
    new_classifier: bool = False
    is_conversion: bool = False


def build_network(args: argparse.Namespace, num_classes: int, accelerator: Accelerator) -> Network:
    """Build network and objective from the options of a training.

    Raises:
        BadValue: naming the option that can't be used.
    """
    options = dict(in_chans=args.in_chans, drop_rate=args.drop, drop_path_rate=args.drop_path, **args.model_kwargs)
    if args.target_cost is not None and networks.is_dynamic(args.model):
        options = {"gates": True} | options
    model = networks.create(
        args.model,
        pretrained=args.pretrained,
        initial_checkpoint=args.initial_checkpoint,
        num_classes=num_classes,
        **options,
    )
    loaded = networks.classifier_was_loaded(model, args.model, args.initial_checkpoint, args.pretrained)
    if args.head_init_scale != 1 and not loaded:
        fine_tuning.scale_classifier(model, args.head_init_scale)
    fixed = args.fix_thresholds or args.target_cost is not None  # gates move weights, not thresholds
    learning = fine_tuning.freeze(model, args.freeze, not loaded, thresholds=fixed)
    data_config = data_config_of(model, args)
    random = not (args.pretrained or args.initial_checkpoint or networks.implies_pretrained(args.model))
    is_conversion = args.target_cost is not None and not random and is_identity(model)
    teacher = _build_teacher(args, model, not loaded, is_conversion, accelerator)
    objective = _build_objective(args, num_classes, data_config, teacher, accelerator)
    model.labeling = objective.labeling
    laid_out = _lay_out(model, args, accelerator)
    return Network(laid_out, objective, data_config, learning, random, not loaded, is_conversion)


def _build_teacher(
    args: argparse.Namespace, student: Any, fresh: bool, is_conversion: bool, accelerator: Accelerator
) -> DistillationTeacher | None:
    name = args.distill
    if name is None and is_conversion and not fresh:
        name = "static"  # what a network that learns to skip is measured by
    if name in (None, "none"):
        return None
    teacher = fine_tuning.create_teacher(name, student, args.model, fresh, in_chans=args.in_chans, **args.model_kwargs)
    return teacher.to(accelerator.device)


def _build_objective(
    args: argparse.Namespace,
    num_classes: int,
    data_config: dict[str, Any],
    teacher: DistillationTeacher | None,
    accelerator: Accelerator,
) -> ClassificationObjective:
    mixup, labeling = None, labeling_of_options(args)
    dense = labeling.task != "single"  # smoothed before they are mixed
    if args.mixup or args.cutmix:
        mixup = Mixup(
            args.mixup,
            args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=0.0 if dense else args.smoothing,
            num_classes=num_classes,
            multi_label=dense,
        )
    mean, std = (torch.tensor(data_config[key], device=accelerator.device).view(1, -1, 1, 1) for key in ("mean", "std"))
    return ClassificationObjective(
        num_classes,
        smoothing=args.smoothing,
        labeling=labeling,
        mixup=mixup,
        teacher=teacher,
        distill_weight=args.distill_weight,
        temperature=args.distill_temperature,
        student_norm=(mean, std),
        seed=args.seed,
    )


def _lay_out(model: Any, args: argparse.Namespace, accelerator: Accelerator) -> Any:
    """Apply the options that change how a network runs, and not what it computes."""
    if args.sync_bn:
        if accelerator.device.type != "cuda":
            raise BadValue("--sync-bn needs GPUs")
        model = convert_sync_batchnorm(model)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if args.compile and args.target_cost is not None:
        compile_blocks(model)
    return model


def build_optimization(
    args: argparse.Namespace, model: nn.Module, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Scheduler, int]:
    """Build the optimizer and the schedule of a training.

    Returns:
        both, and the number of epochs to train.

    Raises:
        BadValue: naming options that exclude each other or that timm does not take.
    """
    groups = optimization.parameter_groups(
        model,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay,
        graph_lr_scale=args.graph_lr_scale,
        gate_lr_scale=args.gate_lr_scale,
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
            raise BadValue("--warmup-updates and --milestone-updates belong to --updates; give it, too")
        schedule, epochs = optimization.create_schedule(optimizer, updates_per_epoch=updates_per_epoch, **options)
        return optimizer, schedule, epochs
    of_epochs = {"cooldown_epochs": 0, "decay_epochs": None, "warmup_epochs": 0.0, "warmup_prefix": False}
    given = [f"--{key.replace('_', '-')}" for key, default in of_epochs.items() if options[key] != default]
    if given:
        raise BadValue(f"{', '.join(given)}: counted in epochs, and --updates counts in updates; leave one of them out")
    options |= dict(  # an update is the schedule's epoch
        epochs=args.updates,
        warmup_epochs=float(args.warmup_updates or 0),
        decay_milestones=args.milestone_updates or [args.updates],
    )
    schedule, _ = optimization.create_schedule(optimizer, updates_per_epoch=1, **options)
    return optimizer, schedule, -(-args.updates // updates_per_epoch)
