"""The network to train or to validate, its teacher, and what of it is frozen."""

import difflib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import load_model_config_from_hf
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from dg_timm.conversion.state_dict import is_identity, is_static
from dg_timm.graph.stage import GRAPH_OPTIONS, graph_stages, routers
from dg_timm.hub.card import Card
from dg_timm.hub.save import save_pretrained, write_config
from dg_timm.models import registry as zoo

TimmModel = Any  # an nn.Module with timm's attributes
NORMS = (nn.modules.batchnorm._BatchNorm,)


def create(
    name: str,
    *,
    pretrained: bool = False,
    initial_checkpoint: Optional[str] = None,
    num_classes: Optional[int] = None,
    **options: Any,
) -> TimmModel:
    """A timm model by any of its names.

    Args:
        name: a timm or ``dg_*`` name (``dg_`` before any convertible timm model), ``hf-hub:org/name``,
            ``local-dir:folder``, or a folder in Hub layout: a saved model, or a checkpoint of a run.
        pretrained: load the weights that the name stands for (always, for the last three).
        initial_checkpoint: a safetensors file, or a folder with model.safetensors, to start from instead. Weights of a
            static network make a ``dg_*`` model its identity conversion; a classifier of other classes is left out.
            Where the config.json beside them tells how a graph was made, it is made so again, but for ``options``.
        num_classes: of the classifier; by default the weights' own.
        options: what timm's model takes; None is left out.

    Raises:
        ValueError: naming an unknown model, or options that exclude each other.
        FileNotFoundError, ValueError: for weights that are not there, unreadable, or do not fit.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if num_classes is not None:
        options["num_classes"] = num_classes
    name, folder = _resolve(name)
    if initial_checkpoint is not None:
        if pretrained or folder:
            source = name if folder else "--pretrained"
            raise ValueError(f"{source} and the checkpoint {initial_checkpoint} both name weights; give one of them")
        file = _weights_file(initial_checkpoint)
        classes = _classes_in(name, file, needed=not options.get("features_only"))
        overlay = dict(file=str(file), num_classes=classes, url="", hf_hub_id=None)
        options = _graph_options(name, file) | options | dict(pretrained_cfg_overlay=overlay)
    try:
        return timm.create_model(name, pretrained=pretrained or folder or initial_checkpoint is not None, **options)
    except (RuntimeError, TypeError) as error:  # weights that do not fit, options that the model does not take
        raise ValueError(f"{name}: {error}") from error


def _resolve(name: str) -> tuple[str, bool]:
    """(what timm.create_model takes, whether that names weights); registers a ``dg_`` twin that is not in the zoo."""
    if name.startswith(("hf-hub:", "hf_hub:")):
        return name, True
    path = Path(name.removeprefix("local-dir:"))
    if not (path / "config.json").exists() and (path / "model" / "config.json").exists():
        path = path / "model"  # of a run's folder
    if name.startswith("local-dir:") or (path / "config.json").exists():
        config = path / "config.json"
        if not config.exists():
            raise FileNotFoundError(
                f"{path} has no config.json; give a folder saved by dg_timm.save_pretrained or train.py"
            )
        zoo.register_twin(json.loads(config.read_text()).get("architecture", ""))
        return f"local-dir:{path}", True
    zoo.register_twin(name)
    if not timm.is_model(name):
        if path.exists():
            raise FileNotFoundError(f"{name} has no config.json; give a checkpoint's folder (checkpoints/last, model)")
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.0)
        raise ValueError(f"{name} is no timm or dg_timm model; do you mean {', '.join(near)}?")
    return name, False


def names_weights(name: str) -> bool:
    """Whether a name stands for weights, not only for an architecture."""
    return _resolve(name)[1]


def saved_args(name: str) -> dict[str, Any]:
    """The arguments with which the model of a folder or of the Hub was made, as its config.json has them."""
    name, saved = _resolve(name)
    if not saved:
        return {}
    kind, _, place = name.partition(":")
    if kind == "local-dir":
        args: Optional[dict[str, Any]] = json.loads((Path(place) / "config.json").read_text()).get("model_args")
    else:
        args = load_model_config_from_hf(place)[2]
    return args or {}


def _weights_file(source: str) -> Path:
    path = Path(source)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {source}: there is no {file}")
    if file.suffix != ".safetensors":
        raise ValueError(f"checkpoint {source}: only safetensors are loaded; save the weights in that format")
    return file


def _graph_options(name: str, weights: Path) -> dict[str, Any]:
    """Options of the graph that these weights were of: others may take the same tensors and predict something else."""
    config = weights.with_name("config.json")
    if not name.startswith("dg_") or not config.exists():
        return {}
    made: dict[str, Any] = json.loads(config.read_text())
    if not str(made.get("architecture", "")).startswith("dg_"):
        return {}
    return {key: value for key, value in (made.get("model_args") or {}).items() if key in GRAPH_OPTIONS}


def _classes_in(name: str, file: Path, needed: bool = True) -> int:
    """How many classes the classifier in a weights file has; 0 if there is none, and none is needed."""
    classifier = timm.get_pretrained_cfg_value(name, "classifier")
    try:
        with safe_open(file, "pt") as tensors:
            for key in (f"{classifier}.weight", f"{classifier}.bias"):
                if key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    return int(tensors.get_slice(key).get_shape()[0])
    except SafetensorError as error:
        raise ValueError(f"{file} can't be read: {error}; it is truncated or no safetensors file") from error
    if not needed:
        return 0
    raise ValueError(f"{file} has no classifier {classifier}.weight; it is not a checkpoint of {name}")


def same_classifier(model: nn.Module, name: str, initial_checkpoint: Optional[str], pretrained: bool) -> bool:
    """Whether the classifier came with the weights, rather than being new."""
    if initial_checkpoint is not None:
        return _classes_in(_resolve(name)[0], _weights_file(initial_checkpoint)) == model.num_classes
    cfg = getattr(model, "pretrained_cfg", {})
    return (pretrained or _resolve(name)[1]) and cfg.get("num_classes") == model.num_classes


def static_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a dynamic network's weights its static network has."""
    return {key: value for key, value in state_dict.items() if is_static([key])}


def create_teacher(
    name: str, student: TimmModel, student_name: str, fresh: bool, **options: Any
) -> DistillationTeacher:
    """The frozen network whose logits are learned from.

    Args:
        name: any that :func:`create` takes, with weights; or ``static``: the student's static network.
        student: before any training.
        fresh: whether the student's weights (or its classifier) are random.

    Raises:
        ValueError: if the student has no trained static network, or the teacher has other classes.
    """
    if name == "static":
        if not graph_stages(student):
            raise ValueError(
                f"{student_name} is static: --distill alone means the network it was converted from; name a teacher"
            )
        if fresh:
            raise ValueError(
                f"--distill: the static network of {student_name} has no trained classifier for these classes. "
                "Fine-tune that one first and start from it (--initial-checkpoint), or name a teacher"
            )
        if not is_identity(student):
            raise ValueError(
                f"--distill: {student_name} starts from dynamic weights, not from a static network; name a teacher"
            )
        options = {key: value for key, value in options.items() if key not in GRAPH_OPTIONS}
        architecture = student.pretrained_cfg["architecture"]
        teacher = timm.create_model(architecture.removeprefix("dg_"), num_classes=student.num_classes, **options)
        teacher.load_state_dict(static_part(student.state_dict()))
    else:
        teacher = create(name, pretrained=True)
        if teacher.num_classes != student.num_classes:
            raise ValueError(f"the teacher {name} has {teacher.num_classes} classes, the student {student.num_classes}")
    return DistillationTeacher(teacher.requires_grad_(False).eval())


@torch.no_grad()
def scale_classifier(model: nn.Module, factor: float) -> None:
    """Multiply the classifier's weights; its bias starts at 0.

    EfficientNets draw a classifier from +-1 / sqrt(classes): over 10 classes its logits are large, and the first
    updates undo pretrained features.
    """
    for name, parameter in model.get_classifier().named_parameters():  # type: ignore[operator]
        parameter.mul_(0.0 if name.endswith("bias") else factor)


def freeze(model: nn.Module, what: str, new_classifier: bool, thresholds: bool = False) -> list[str]:
    """Stop parameters from learning.

    Args:
        what: ``none``; ``backbone`` (all but the classifier); ``all-but-graph`` (all but routers, scales, thresholds
            and projections, and a classifier that is new).
        thresholds: also those of the graph.

    Returns:
        the names of what still learns.
    """
    classifier = {id(p) for p in model.get_classifier().parameters()}  # type: ignore[operator]
    if what == "all-but-graph" and not graph_stages(model):
        raise ValueError(f"--freeze all-but-graph leaves nothing to learn in this {type(model).__name__}: it is static")
    for name, parameter in model.named_parameters():
        if what == "backbone":
            parameter.requires_grad_(id(parameter) in classifier)
        elif what == "all-but-graph":
            parameter.requires_grad_(not is_static([name]) or (new_classifier and id(parameter) in classifier))
    if thresholds:
        for router in routers(model).values():
            router.threshold.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def set_train_mode(model: nn.Module, fixed_norms: bool = False) -> None:
    """Training mode, with the statistics of frozen norms (or of all) left as they are."""
    model.train()
    for module in model.modules():
        frozen = module.weight is not None and not module.weight.requires_grad if isinstance(module, NORMS) else False
        if isinstance(module, NORMS) and (fixed_norms or frozen):
            module.eval()


def has_finite_weights(model: nn.Module) -> bool:
    """Whether every floating-point weight and statistic is finite."""
    finite = [torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point()]
    return bool(torch.stack(finite).all())


def load_weights(model: nn.Module, file: Path) -> None:
    """Load safetensors into a model of the same names and shapes."""
    model.load_state_dict(load_file(file))


def save_model(model: nn.Module, folder: Path, card: Card, **config: Any) -> None:
    """Write a network in Hub layout: as :func:`dg_timm.save_pretrained`; a static one without a card."""
    if graph_stages(model):
        save_pretrained(model, folder, overwrite=True, card=card, **config)
        return
    folder.mkdir(parents=True, exist_ok=True)  # a static network's card is timm's business
    beside = folder / ".saving"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
    write_config(model, beside / "config.json", **config)
    for file in beside.iterdir():
        file.replace(folder / file.name)
    beside.rmdir()
