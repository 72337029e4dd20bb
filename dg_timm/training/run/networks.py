"""Make the network that is trained or validated, by any of its names and from any weights."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as read_tensors
from timm.models import load_model_config_from_hf, load_state_dict
from torch import nn

from dg_timm._errors import BadValue, UserError
from dg_timm.graph.stage import GATE_OPTIONS, GRAPH_OPTIONS
from dg_timm.hub.labeling import SINGLE, Labeling, labeling_in, labeling_of
from dg_timm.hub.layout import WEIGHTS
from dg_timm.models import registry as zoo

TimmModel = Any  # an nn.Module with timm's attributes
_WEIGHT_FILES = (WEIGHTS, "pytorch_model.bin")
_WRAPPER = "timm_model."  # before every name that transformers' Trainer saves


def create(
    name: str,
    *,
    pretrained: bool = False,
    initial_checkpoint: str | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> TimmModel:
    """Make a timm model by any of its names.

    Args:
        name: a timm or ``dg_*`` name (``dg_`` may stand before any timm model that ``dg_timm.dynamize`` takes),
            ``hf-hub:org/name``, ``local-dir:folder``, or a folder in Hub layout: a saved model, or a checkpoint of a
            run.
        pretrained: load the weights that the name stands for; the last three kinds of names always do.
        initial_checkpoint: a safetensors file, or a folder with model.safetensors, to start from instead. Weights of a
            static network make a ``dg_*`` model its identity conversion. A classifier of other classes is left out.
            If a config.json beside the weights tells the options of a graph, they are used, but for ``options``.
        num_classes: of the classifier; by default that of the weights.
        options: arguments of timm's model; None is left out.

    Raises:
        BadValue: for an unknown model, options that exclude each other or that the model does not take, and weights
            that are missing, unreadable, or do not fit.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if num_classes is not None:
        options["num_classes"] = num_classes
    name, folder = _resolve(name)
    if initial_checkpoint is not None:
        if pretrained or folder:
            source = name if folder else "--pretrained"
            raise BadValue(f"{source} and the checkpoint {initial_checkpoint} both name weights; give one of them")
        file = _weights_file(initial_checkpoint)
        classes = _classes_in(name, file, needed=not options.get("features_only"))
        weights: dict[str, Any] = {"file": str(file)}
        if _is_wrapped(file):
            weights = {"state_dict": {key.removeprefix(_WRAPPER): value for key, value in read_tensors(file).items()}}
        overlay = dict(**weights, num_classes=classes, url="", hf_hub_id=None)
        options = _graph_options(name, file) | options | dict(pretrained_cfg_overlay=overlay)
    elif folder and (place := _of_transformers(name)) is not None:
        model = _with_classes(load_folder(place), options)
        model.labeling = labeling_in(read_config(place))
        return model
    try:
        model = timm.create_model(name, pretrained=pretrained or folder or initial_checkpoint is not None, **options)
        noted = labeling_of(model) if initial_checkpoint is None else _labeling_beside(file, classes, model)
        model.labeling = noted  # type: ignore[assignment]
        getattr(model, "pretrained_cfg", {}).pop("state_dict", None)  # of a checkpoint; it has done its work
        return model
    except UserError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        # of timm: weights that are missing or do not fit, tags and options that the model does not have
        raise BadValue(f"{name}: {error}") from error


def load_folder(folder: Path) -> TimmModel:
    """Load a model that timm, train.py or transformers' Trainer saved.

    Raises:
        BadValue: if there are no weights, or they do not fit.
    """
    config = read_config(folder)
    files = [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]
    if not files:
        raise BadValue(f"{folder} holds no weights ({' or '.join(_WEIGHT_FILES)})")
    return load_file(str(config.get("architecture", "")), config, files[0])


def load_file(arch: str, config: Mapping[str, Any], file: Path) -> TimmModel:
    """Load weights of a model, with or without the prefix that transformers' Trainer puts before their names.

    Args:
        arch: timm's name of the model.
        config: content of a config.json, or nothing.
        file: safetensors, or a pickle, of which only tensors are read.

    Raises:
        BadValue: if they can't be read or do not fit.
    """
    implies_pretrained(arch)  # names the nearest model if there is none
    try:
        state = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # unpickling raises what it likes
        raise BadValue(f"{file} can't be read as weights: {str(error).splitlines()[0]}") from error
    state = {key.removeprefix(_WRAPPER): value for key, value in state.items()}
    options: dict[str, Any] = dict(config.get("model_args") or {})
    head = state.get(f"{timm.get_pretrained_cfg_value(arch, 'classifier')}.weight")
    options["num_classes"] = config.get("num_classes") or (len(head) if head is not None else 0)
    cfg = config.get("pretrained_cfg")
    if cfg:
        options |= {"pretrained_cfg": {key: tuple(v) if isinstance(v, list) else v for key, v in cfg.items()}}
        options.setdefault("in_chans", cfg["input_size"][0])
    try:
        model: TimmModel = timm.create_model(arch, **options)
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadValue(f"{file} is no checkpoint of {arch}: {' '.join(str(error).split())[:300]}") from error
    if config.get("label_names"):
        model.pretrained_cfg["label_names"] = config["label_names"]
    model.pretrained_cfg["num_classes"] = model.num_classes
    return model


def _with_classes(model: TimmModel, options: dict[str, Any]) -> TimmModel:
    """Give a loaded model another number of classes; refuse other options, which are those of a model to be made."""
    others = sorted(key for key in options if key not in ("num_classes", "in_chans"))
    if others or options.get("in_chans", model.in_chans) != model.in_chans:
        named = ", ".join(others or ["in_chans"])
        raise BadValue(f"{named}: not for a folder that transformers saved; write it anew with dg-timm convert first")
    if options.get("num_classes", model.num_classes) != model.num_classes:
        model.reset_classifier(options["num_classes"])
    return model


def _of_transformers(name: str) -> Path | None:
    """The folder that transformers' Trainer saved of a timm model, whose config.json timm does not read."""
    kind, _, place = name.partition(":")
    if kind != "local-dir":
        return None
    config = read_config(Path(place))
    is_theirs = config.get("model_type") == "timm_wrapper" or ("model_args" in config and config["model_args"] is None)
    return Path(place) if is_theirs else None


def _labeling_beside(weights: Path, classes: int, model: TimmModel) -> Labeling:
    """Read what the outputs of a network mean from beside its weights, if its classifier came with them."""
    known = weights.with_name("config.json").exists() and classes == getattr(model, "num_classes", None)
    return labeling_in(read_config(weights.parent)) if known else SINGLE


def _resolve(name: str) -> tuple[str, bool]:
    """Find what ``timm.create_model`` takes, and whether that names weights; make timm know every ``dg_`` name."""
    if name.startswith(("hf-hub:", "hf_hub:")):
        return name, True
    path = Path(name.removeprefix("local-dir:"))
    if not (path / "config.json").exists() and (path / "model" / "config.json").exists():
        path = path / "model"  # of a run's folder
    if name.startswith("local-dir:") or (path / "config.json").exists():
        zoo.try_register(read_config(path).get("architecture", ""))
        return f"local-dir:{path}", True
    zoo.try_register(name)
    if not timm.is_model(name):
        if path.exists():
            raise BadValue(f"{name} has no config.json; give a checkpoint's folder (checkpoints/last, model)")
        if "/" in name or name.startswith((".", "~")):  # no model of timm is called so
            raise BadValue(f"there is no folder {name}; for a model of the Hub give hf-hub:{name.lstrip('./~')}")
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.0)
        raise BadValue(f"{name} is not a timm or dg_timm model; do you mean {', '.join(near)}?")
    return name, False


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder in Hub layout."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadValue(
            f"{folder} has no config.json; give a folder saved by dg_timm.save_pretrained or train.py"
        ) from error
    except (OSError, ValueError) as error:
        raise BadValue(f"{folder / 'config.json'} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise BadValue(f"{folder / 'config.json'} is not the configuration of a model")
    if "detector" in config:
        raise BadValue(f"{folder} holds a detector; evaluate it with dg-timm detect --evaluate {folder}")
    return config


def implies_pretrained(name: str) -> bool:
    """Tell whether a name stands for weights, not only for an architecture."""
    return _resolve(name)[1]


def is_dynamic(name: str) -> bool:
    """Tell whether a name stands for a dynamic network."""
    architecture = architecture_of(name)
    if architecture.startswith(("hf-hub:", "hf_hub:")):
        architecture = load_model_config_from_hf(architecture.partition(":")[2])[1]
    return architecture.startswith("dg_")


def architecture_of(name: str) -> str:
    """Give the name, with its tag, of the model that a folder holds; any other name is returned as it is."""
    known, saved = _resolve(name)
    kind, _, place = known.partition(":")
    return str(read_config(Path(place)).get("architecture", "")) if saved and kind == "local-dir" else name


def saved_args(name: str) -> dict[str, Any]:
    """Read from config.json with which arguments the model of a folder or of the Hub was made; none for other names."""
    name, saved = _resolve(name)
    if not saved:
        return {}
    kind, _, place = name.partition(":")
    if kind == "local-dir":
        return read_config(Path(place)).get("model_args") or {}
    return load_model_config_from_hf(place)[2] or {}


def _weights_file(source: str) -> Path:
    path = Path(source)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise BadValue(f"checkpoint {source}: there is no {file}")
    if file.suffix != ".safetensors":
        raise BadValue(f"checkpoint {source}: only safetensors are loaded; save the weights in that format")
    return file


def _graph_options(name: str, weights: Path) -> dict[str, Any]:
    """Read the graph's options from beside the weights: with others the same tensors may predict something else."""
    if not name.startswith("dg_") or not weights.with_name("config.json").exists():
        return {}
    made = read_config(weights.parent)
    if not str(made.get("architecture", "")).startswith("dg_"):
        return {}
    return {
        key: value for key, value in (made.get("model_args") or {}).items() if key in (*GRAPH_OPTIONS, *GATE_OPTIONS)
    }


def _is_wrapped(file: Path) -> bool:
    """Whether transformers' Trainer saved these weights, with a prefix before every name."""
    try:
        with safe_open(file, "pt") as tensors:
            return all(key.startswith(_WRAPPER) for key in tensors.keys())  # noqa: SIM118 (safe_open is not a mapping)
    except (SafetensorError, OSError):  # said where the classes are counted
        return False


def _classes_in(name: str, file: Path, needed: bool = True) -> int:
    """Count the classes of the classifier in a weights file; 0 if there is none, and none is needed."""
    classifier = timm.get_pretrained_cfg_value(name, "classifier")
    try:
        with safe_open(file, "pt") as tensors:
            names = (f"{prefix}{classifier}.{part}" for prefix in ("", _WRAPPER) for part in ("weight", "bias"))
            for key in names:
                if key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    return int(tensors.get_slice(key).get_shape()[0])
    except (SafetensorError, OSError) as error:
        raise BadValue(f"{file} can't be read: {error}; it is truncated or not a safetensors file") from error
    if not needed:
        return 0
    raise BadValue(f"{file} has no classifier {classifier}.weight; it is not a checkpoint of {name}")


def classifier_was_loaded(model: nn.Module, name: str, initial_checkpoint: str | None, pretrained: bool) -> bool:
    """Tell whether the classifier of a model that :func:`create` made came with the weights, rather than being new."""
    if initial_checkpoint is not None:
        return _classes_in(_resolve(name)[0], _weights_file(initial_checkpoint)) == model.num_classes
    cfg = getattr(model, "pretrained_cfg", {})
    return (pretrained or _resolve(name)[1]) and cfg.get("num_classes") == model.num_classes
