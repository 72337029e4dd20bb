"""The model zoo: every row of VARIANTS is a timm model with a ``dg_`` twin, registered on import.

Each pretrained tag of the static model is a tag of ours and names the same, static, weights: loading turns them into
the identity-converted network. Weights trained as dynamic networks get tags of their own; their folders go into
``trained/``, and none is good enough to ship yet.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union

import torch
from safetensors import SafetensorError
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    is_model,
    model_entrypoint,
    register_model,
)
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from dg_timm.conversion import state_dict as checkpoint
from dg_timm.conversion.convert import dynamize
from dg_timm.graph.stage import GRAPH_OPTIONS
from dg_timm.hub import downloads as download

VARIANTS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x4d",
    "mobilenetv2_050",
    "mobilenetv2_100",
    "mobilenetv2_140",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "regnetx_002",
    "regnetx_004",
    "regnetx_006",  # the paper's DG-Net-A
    "regnetx_008",
    "regnetx_016",
    "regnetx_032",
    "regnety_002",
    "regnety_004",
    "regnety_006",  # the paper's DG-Net-B
    "regnety_008",
    "regnety_016",
    "regnety_032",
    "cifar_resnet20",
    "cifar_resnet26",
    "cifar_resnet32",
    "cifar_resnet38",
)


def _twin(name: str) -> str:
    architecture, dot, tag = name.partition(".")
    return f"dg_{architecture}{dot}{tag}"


def _trained(folder: Path) -> PretrainedCfg:
    """What timm needs to know of a folder in Hub layout that is part of this package."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    values = {**config["pretrained_cfg"], "num_classes": config["num_classes"], "label_names": config["label_names"]}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key in known}
    return PretrainedCfg(**{**values, "file": str(folder / download.WEIGHTS), "tag": None})


def _options_of_trained(cfg: PretrainedCfg) -> dict[str, Any]:
    """With which graph the network was trained, if it is one that ships; the tensors fit others, too."""
    folder = Path(str(cfg.file)).parent
    if cfg.state_dict is not None or folder not in TRAINED.values():  # the former is loaded where there is one
        return {}
    made = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_args"]
    return {key: value for key, value in made.items() if key in GRAPH_OPTIONS}


# Networks that were trained as dynamic ones, by name and tag.
TRAINED = {folder.name: folder for folder in sorted((Path(__file__).parent / "pretrained").glob("dg_*"))}

_cfgs: dict[str, Union[dict[str, Any], PretrainedCfg]] = {name: _trained(path) for name, path in TRAINED.items()}
default_cfgs = generate_default_cfgs(
    _cfgs
    | {
        _twin(name): dataclasses.replace(cfg, architecture=None)
        for variant in VARIANTS
        for name, cfg in get_arch_pretrained_cfgs(variant).items()
        if cfg.has_weights or not any(trained.startswith(f"{_twin(name)}.") for trained in TRAINED)
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ``dg_<variant>``: the static network from timm's own entrypoint, made dynamic, then loaded and wrapped.

    Without weights every node starts from the mean of its predecessors; a static checkpoint starts as the identity.

    Args:
        **kwargs: what :func:`dg_timm.dynamize` takes (``edge_scale``, ``block_shortcut``, ``instance_aware``,
            ``topology``, ``topology_seed``; by default as a network that ships with this package was trained), and what
            timm takes for the static model (``num_classes``, ``in_chans``, ``output_stride``, ...).
    """
    cfg, overlay = kwargs.pop("pretrained_cfg", None), dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    named = resolve_pretrained_cfg(_twin(variant), cfg, overlay)
    options = _options_of_trained(named) if pretrained else {}
    options |= {key: kwargs.pop(key) for key in GRAPH_OPTIONS if key in kwargs}
    static_entrypoint = model_entrypoint(variant)
    module = sys.modules[static_entrypoint.__module__]
    static_filter = getattr(module, "checkpoint_filter_fn", getattr(module, "_filter_fn", None))

    def build(**model_kwargs: Any) -> nn.Module:
        try:
            static = static_entrypoint(pretrained=False, **model_kwargs)
        except TypeError as error:
            if "unexpected keyword argument" in str(error):
                raise TypeError(
                    f"{_twin(variant)}: {error}. Its own options are {', '.join(GRAPH_OPTIONS)}, the others those of "
                    f"timm's {variant}; a model saved by a newer dg_timm may need that version"
                ) from error
            raise
        return dynamize(static, identity=False, **options)

    # `blocks` of an EfficientNet is a Sequential of stages, which timm's feature wrappers must look into
    feature_cfg = {"flatten_sequential": True, **kwargs.pop("feature_cfg", {})}
    if kwargs.get("features_only") and "out_indices" not in kwargs:
        with torch.device("meta"):  # the levels that timm takes of this model, not always five
            feature_cfg["out_indices"] = static_entrypoint(
                pretrained=False, features_only=True
            ).feature_info.out_indices
    if kwargs.pop("pretrained_strict", True) is not True:  # a configuration from the Hub could ask for it
        raise TypeError(
            f"{_twin(variant)}: pretrained_strict=False would leave parts of the network random; leave it out"
        )
    try:
        located = download.locate(named.to_dict(), kwargs.get("cache_dir")) if pretrained else {}
        model = build_model_with_cfg(
            build,
            _twin(variant),
            pretrained,
            pretrained_cfg=cfg,
            pretrained_cfg_overlay={**overlay, **located},
            pretrained_filter_fn=_weights_filter(static_filter),
            feature_cfg=feature_cfg,
            **kwargs,
        )
    except SafetensorError as error:
        raise RuntimeError(
            f"the weights of {_twin(variant)} can't be read: {error}. The safetensors file is truncated or damaged; "
            "fetch it again"
        ) from error
    for part in model.modules():  # what a configuration says of its source is what the user named
        for key in located:
            _restore(part, key, getattr(named, key))
    # a card must not name a source that these weights do not have
    model.from_scratch = not pretrained  # type: ignore[assignment]
    model.weights_from = named.hf_hub_id if located and named.source != "local-dir" else None  # type: ignore[assignment]
    return model


def _restore(part: nn.Module, key: str, value: Any) -> None:
    cfg = getattr(part, "pretrained_cfg", None)
    if isinstance(cfg, dict):
        cfg.pop(key, None)
        if value is not None:
            cfg[key] = value


def _weights_filter(static_filter: Any) -> Callable[[dict[str, Any], nn.Module], dict[str, Any]]:
    def to_dynamic(state_dict: dict[str, Any], model: nn.Module) -> Mapping[str, Any]:
        if static_filter is not None:
            takes_model = len(inspect.signature(static_filter).parameters) > 1
            state_dict = static_filter(state_dict, model) if takes_model else static_filter(state_dict)
        state_dict = checkpoint.to_identity(model, state_dict)
        # timm loads loosely when it adapts the classifier; what lies in a graph must fit all the same
        checkpoint.check_fit(model, state_dict, within=tuple(f"{name}." for name in checkpoint.graph_stages(model)))
        return state_dict

    return to_dynamic  # type: ignore[return-value]


def register_twin(name: str) -> None:
    """Make ``dg_<any timm model>`` known to timm in this process, where the zoo does not list it.

    Any other name is left alone, and so is a model without a stage to convert until it is created.
    """
    variant = name.partition(".")[0].removeprefix("dg_")
    if not name.startswith("dg_") or is_model(_twin(variant)) or not is_model(variant):
        return
    cfgs: Any = {
        _twin(n): dataclasses.replace(c, architecture=None) for n, c in get_arch_pretrained_cfgs(variant).items()
    }
    default_cfgs.update(generate_default_cfgs(cfgs))
    _register(variant)


def _register(variant: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = _twin(variant)
    entrypoint.__doc__ = f"timm's {variant} as a dynamic graph network; takes what {variant} takes, and see _create."
    setattr(sys.modules[__name__], entrypoint.__name__, register_model(entrypoint))


__all__ = ["VARIANTS"]
for _variant in VARIANTS:
    _register(_variant)
