"""Prepare a network for its training: a teacher, a new classifier, what is frozen; and save what came of it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm.conversion.state_dict import is_identity, is_static
from dg_timm.graph.stage import GATE_OPTIONS, GRAPH_OPTIONS, graph_stages, routers
from dg_timm.hub.card import Card
from dg_timm.hub.config import write_config
from dg_timm.hub.save import save_pretrained
from dg_timm.training.run.networks import TimmModel, create


def static_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out of a dynamic network's weights what its static network does not have."""
    return {key: value for key, value in state_dict.items() if is_static([key])}


def create_teacher(
    name: str, student: TimmModel, student_name: str, fresh: bool, **options: Any
) -> DistillationTeacher:
    """Make the frozen network whose logits are learned.

    Args:
        name: any that :func:`dg_timm.training.run.networks.create` takes, with weights; or ``static`` for the student's
            static network.
        student: before any training.
        student_name: for messages.
        fresh: whether the student's weights (or its classifier) are random.
        options: arguments with which the student was made; ``static`` uses them.

    Raises:
        BadValue: if the student has no trained static network, or the teacher has other classes.
    """
    if name == "static":
        teacher = _static_teacher(student, student_name, fresh, options)
    else:
        teacher = create(name, pretrained=True)
        if teacher.num_classes != student.num_classes:
            raise BadValue(f"the teacher {name} has {teacher.num_classes} classes, the student {student.num_classes}")
    return DistillationTeacher(teacher.requires_grad_(False).eval())


def _static_teacher(student: TimmModel, student_name: str, fresh: bool, options: dict[str, Any]) -> TimmModel:
    if not graph_stages(student):
        raise BadValue(
            f"{student_name} is static: --distill alone means the network it was converted from; name a teacher"
        )
    if fresh:
        raise BadValue(
            f"--distill: the static network of {student_name} has no trained classifier for these classes. "
            "Fine-tune that one first and start from it (--initial-checkpoint), or name a teacher"
        )
    if not is_identity(student):
        raise BadValue(
            f"--distill: {student_name} starts from dynamic weights, not from a static network; name a teacher"
        )
    options = {key: value for key, value in options.items() if key not in (*GRAPH_OPTIONS, *GATE_OPTIONS)}
    architecture = student.pretrained_cfg["architecture"]
    teacher = timm.create_model(architecture.removeprefix("dg_"), num_classes=student.num_classes, **options)
    teacher.load_state_dict(static_part(student.state_dict()))
    return teacher


@torch.no_grad()
def scale_classifier(model: nn.Module, factor: float) -> None:
    """Multiply the classifier's weights in place, and set its bias to 0.

    EfficientNets draw a classifier from +-1 / sqrt(classes): over 10 classes its logits are large, and the first
    updates undo pretrained features.
    """
    for name, parameter in model.get_classifier().named_parameters():  # type: ignore[operator]
        parameter.mul_(0.0 if name.endswith("bias") else factor)


def freeze(model: nn.Module, what: str, new_classifier: bool, thresholds: bool = False) -> list[str]:
    """Stop parameters from learning, in place.

    Args:
        model: static or dynamic.
        what: ``none``; ``backbone`` (all but the classifier); ``all-but-graph`` (all but routers, edge scales,
            thresholds and projections, and a classifier that is new).
        new_classifier: whether the classifier is new.
        thresholds: freeze those of the graph, too.

    Returns:
        the names of the parameters that still learn.

    Raises:
        BadValue: if that leaves nothing to learn.
    """
    classifier = {id(p) for p in model.get_classifier().parameters()}  # type: ignore[operator]
    if what == "all-but-graph" and not graph_stages(model):
        raise BadValue(f"--freeze all-but-graph leaves nothing to learn in this {type(model).__name__}: it is static")
    for name, parameter in model.named_parameters():
        if what == "backbone":
            parameter.requires_grad_(id(parameter) in classifier)
        elif what == "all-but-graph":
            parameter.requires_grad_(not is_static([name]) or (new_classifier and id(parameter) in classifier))
    if thresholds:
        freeze_thresholds(model)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def freeze_thresholds(model: nn.Module) -> None:
    """Stop the thresholds of a graph from learning, in place: gates move weights, not thresholds."""
    for router in routers(model).values():
        router.threshold.requires_grad_(False)


def save_model(model: nn.Module, folder: Path, card: Card, **config: Any) -> None:
    """Write a network in Hub layout: a dynamic one as ``dg_timm.save_pretrained`` does, a static one without a card.

    Args:
        config: ``label_names`` and ``data_config``, as for ``dg_timm.save_pretrained``.
    """
    if graph_stages(model):
        save_pretrained(model, folder, overwrite=True, card=card, **config)
        return
    folder.mkdir(parents=True, exist_ok=True)  # a static network's card is timm's business
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, Path(temporary) / "model.safetensors", metadata={"format": "pt"})
        write_config(model, Path(temporary) / "config.json", **config)
        for file in Path(temporary).iterdir():
            file.replace(folder / file.name)
