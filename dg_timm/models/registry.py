"""The model zoo: every row of STATIC_MODELS is a timm model whose dynamic network is registered with timm on import.

Each pretrained tag of the static model is a tag of the dynamic one and names the same, static, weights: loading turns
them into the identity conversion. Networks that were trained as dynamic ones have tags of their own (``BUNDLED``), and
a model's default tag is theirs where there is one.
"""

import contextlib
import dataclasses
import difflib
import sys
from typing import Any, Union

import timm
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    is_model,
    register_model,
)
from torch import nn

from dg_timm._errors import BadType, BadValue
from dg_timm.models import cifar_resnet as cifar_resnet  # registers the static networks that STATIC_MODELS names
from dg_timm.models.bundled import BUNDLED, bundled_cfg
from dg_timm.models.creation import create_dynamic

STATIC_MODELS = (
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


def _dynamic_name(name: str) -> str:
    architecture, dot, tag = name.partition(".")
    return f"dg_{architecture}{dot}{tag}"


def _converted_cfgs(static_name: str) -> dict[str, PretrainedCfg]:
    """Give the tags of a static model, as those of its dynamic network."""
    tags = get_arch_pretrained_cfgs(static_name).items()
    return {_dynamic_name(name): dataclasses.replace(cfg, architecture=None) for name, cfg in tags}


def _zoo_cfgs() -> dict[str, Union[dict[str, Any], PretrainedCfg]]:
    """Give the tags of the zoo. A tag without weights makes room for a network that ships."""
    cfgs: dict[str, Any] = {name: bundled_cfg(folder) for name, folder in BUNDLED.items()}
    shipped = {name.partition(".")[0] for name in BUNDLED}
    for static_name in STATIC_MODELS:
        for name, cfg in _converted_cfgs(static_name).items():
            if cfg.has_weights or name.partition(".")[0] not in shipped:
                cfgs[name] = cfg
    return cfgs


default_cfgs = generate_default_cfgs(_zoo_cfgs())  # timm looks for it here, by this name


def register(name: str) -> None:
    """Make ``dg_<any timm model>`` known to timm in this process, where the zoo does not list it.

    A folder or repository with such a network loads only after this call::

        dg_timm.models.register("dg_convnext_atto")
        model = timm.create_model("local-dir:output/train/model", pretrained=True)

    A name that is known already is left alone. Whether the model has a stage to convert is known when it is created.

    Args:
        name: ``dg_`` before the name of a timm model; a tag counts for nothing.

    Raises:
        BadType: if the name is no string.
        BadValue: if it does not begin with ``dg_``, or timm has no model of the name after it.
    """
    if not isinstance(name, str):
        raise BadType(f"name must be a string, got {type(name).__name__}")
    architecture = name.partition(".")[0]
    if is_model(architecture) and architecture.startswith("dg_"):
        return
    static_name = architecture.removeprefix("dg_")
    if static_name == architecture:
        raise BadValue(f'a dynamic network\'s name begins with "dg_", got {name!r}; give "dg_{architecture}"')
    if static_name.startswith("dg_"):
        raise BadValue(f"{static_name} is a dynamic network, and can't be converted again")
    if not is_model(static_name):
        nearest = difflib.get_close_matches(static_name, timm.list_models(), n=3, cutoff=0.0)
        raise BadValue(f"timm has no model {static_name!r}; the nearest names are {', '.join(nearest)}")
    cfgs: Any = _converted_cfgs(static_name)
    default_cfgs.update(generate_default_cfgs(cfgs))
    _register(static_name, in_zoo=False)


def try_register(name: object) -> None:
    """Make a name known to timm if it is that of a timm model after ``dg_``; leave anything else alone.

    For names that come from a command line or a configuration, and are checked later.
    """
    with contextlib.suppress(BadType, BadValue):
        register(name)  # type: ignore[arg-type]


def _register(static_name: str, in_zoo: bool) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_dynamic(static_name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = _dynamic_name(static_name)
    entrypoint.__doc__ = (
        f"Build timm's {static_name} as a dynamic graph network; takes what {static_name} takes, and the options of "
        "dg_timm.dynamize."
    )
    entrypoint.outside_the_zoo = not in_zoo  # type: ignore[attr-defined]  # its card says how to make the name known
    setattr(sys.modules[__name__], entrypoint.__name__, register_model(entrypoint))


__all__ = ["BUNDLED", "STATIC_MODELS", "register"]  # timm adds the entrypoints
for _static_name in STATIC_MODELS:
    _register(_static_name, in_zoo=True)
