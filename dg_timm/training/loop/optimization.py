"""Batch arithmetic, parameter groups, optimizer and schedule. Everything counts in updates of the weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from dg_timm._errors import BadValue
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import routers

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
FOREACH_OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam", "adamw")  # these have a foreach implementation


class BatchSplit(NamedTuple):
    """How the images of one update are shared: ``images = micro_batch * accumulation * processes``.

    Attributes:
        images: of an update, over all processes.
        micro_batch: images that a process runs at a time.
        accumulation: micro-batches of a process in an update.
        processes: how many there are.
    """

    images: int
    micro_batch: int
    accumulation: int
    processes: int


def split_batch(images: int, processes: int, micro_batch: int | None = None) -> BatchSplit:
    """Rank ``images`` over the processes, at most ``micro_batch`` of them at a time on each.

    Raises:
        ValueError: if they can't be shared evenly, with the nearest number that can.
    """
    each = images // processes
    if each * processes != images or each == 0:
        near = max(round(images / processes), 1) * processes
        raise BadValue(
            f"--batch-size {images} can't be shared by {processes} processes; the nearest that can is {near}"
        )
    size = min(micro_batch or each, each)
    if each % size:
        fitting = max(k for k in range(1, size + 1) if each % k == 0)
        raise BadValue(
            f"--micro-batch {size} does not divide the {each} images of a process (--batch-size {images} over "
            f"{processes} processes); use {fitting}"
        )
    return BatchSplit(images, size, each // size, processes)


def scaled_lr(lr: float, images: int, base_batch: int | None, rule: str = "linear") -> float:
    """Scale a learning rate that was given for ``base_batch`` images an update to ``images`` an update.

    ``rule`` is ``linear`` (Goyal et al., 2017) or ``sqrt``; without a ``base_batch`` the rate stays.
    """
    if base_batch is None:
        return lr
    ratio = images / base_batch
    return lr * (ratio if rule == "linear" else ratio**0.5)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None = None,
    graph_lr_scale: float = 1.0,
    gate_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Group the parameters that learn as timm does, with the graph's in a group (or one for each layer) of their own.

    The graph's parameters are those of routers (weights, biases, edge scales and thresholds) and of gates. They have no
    weight decay, like biases and norms.

    Args:
        model: static or dynamic.
        weight_decay: of all other weights.
        layer_decay: factor of the learning rate for each layer from the classifier down; None for none.
        graph_lr_scale: factor of the routers' learning rate.
        gate_lr_scale: factor of the gates' learning rate.
    """
    unweighted = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    if layer_decay is not None:
        groups = param_groups_layer_decay(
            model, weight_decay=weight_decay, no_weight_decay_list=tuple(unweighted), layer_decay=layer_decay
        )
    else:
        groups = param_groups_weight_decay(model, weight_decay=weight_decay, no_weight_decay_list=unweighted)
    scales = {id(p): graph_lr_scale for router in routers(model).values() for p in router.parameters()}
    scales |= {id(p): gate_lr_scale for gate in gates(model).values() for p in gate.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    split = []
    for group in groups:
        for own in (None, *dict.fromkeys(scales.values())):  # None: of no graph
            params = [p for p in group["params"] if scales.get(id(p)) == own]
            if params:
                scale = group.get("lr_scale", 1.0) * (1.0 if own is None else own)
                decay = group["weight_decay"] if own is None else 0.0
                split.append(dict(params=params, weight_decay=decay, lr_scale=scale, graph=own is not None))
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}  # a router's weights and biases share a group
    for group in split:
        key = (group["graph"], group["lr_scale"], group["weight_decay"])
        merged.setdefault(key, {**group, "params": []})["params"] += group["params"]
    for group in merged.values():
        group["param_names"] = [names[id(p)] for p in group["params"]]
    return list(merged.values())


def create_optimizer(
    groups: list[dict[str, Any]], *, opt: str, lr: float, momentum: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Make any of timm's optimizers over parameter groups.

    Raises:
        BadValue: if timm has no optimizer of the name, or it does not take the options.
    """
    try:
        return create_optimizer_v2(
            groups,
            opt=opt,
            lr=lr,
            weight_decay=0.0,  # each group states its own
            momentum=momentum,
            foreach=True if opt in FOREACH_OPTIMIZERS else None,
            **options,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise BadValue(f"--opt {opt} with {dict(options)}: {error}") from error


def create_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    sched: str,
    epochs: int,
    updates_per_epoch: int,
    warmup_epochs: float,
    warmup_lr: float,
    min_lr: float,
    cooldown_epochs: int,
    decay_rate: float,
    decay_epochs: float | None,
    decay_milestones: list[int],
    warmup_prefix: bool,
) -> tuple[Scheduler, int]:
    """Make timm's schedule, which counts updates, and set it to update 0.

    Returns:
        the schedule, and the number of epochs to train, with warm-up prefix and cool-down.

    Raises:
        BadValue: if the warm-up takes all epochs, or timm refuses the schedule.
    """
    if warmup_epochs >= epochs and not warmup_prefix:
        raise BadValue(f"--warmup-epochs {warmup_epochs:g} leaves nothing of --epochs {epochs}")
    try:
        schedule, total = create_scheduler_v2(
            optimizer,
            sched,
            num_epochs=epochs,
            warmup_epochs=warmup_epochs,  # type: ignore[arg-type]  # fractions are fine
            warmup_lr=warmup_lr,
            min_lr=min_lr,
            cooldown_epochs=cooldown_epochs,
            decay_rate=decay_rate,
            decay_epochs=decay_epochs,
            decay_milestones=decay_milestones,
            warmup_prefix=warmup_prefix,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError as error:  # of timm: a schedule that does not fit its own length
        raise BadValue(f"--sched {sched}: {error}") from error
    schedule.step_update(0)  # timm applies lr_scale from the first step on only
    return schedule, int(total)
