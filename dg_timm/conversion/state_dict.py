"""Between static and dynamic state dicts: complete a static one to the identity, and name what does not fit."""

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from dg_timm.conversion.blocks import Projection
from dg_timm.graph.router import Router
from dg_timm.graph.stage import GRAPH_OPTIONS, graph_stages, routers

_MOST = 8  # keys of each kind that an error names
_GRAPH_KEY = re.compile(r"(^|\.)(router\d+|projection)\.")


def is_static(state_dict: Iterable[str]) -> bool:
    """Whether these are the keys of a static network: none is a router's or a projection's."""
    return not any(_GRAPH_KEY.search(key) for key in state_dict)


def is_identity(model: nn.Module) -> bool:
    """Whether every stage is the static one: the chain at weight 1, every other edge at 0, for every image."""
    return all(stage.is_complete() for stage in graph_stages(model).values()) and all(
        router.scale is not None
        and float(router.scale[0].detach()) == 2.0
        and not bool(router.scale[1:].any())
        and not any(bool(p.any()) for name, p in router.named_parameters() if name not in ("scale", "threshold"))
        for router in routers(model).values()
    )


def to_identity(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a static state dict into that of the identity-converted ``model``; any other comes back as it is.

    Raises:
        ValueError: if the model's options leave no identity (``edge_scale=False`` or ``block_shortcut=False``).
    """
    state_dict = dict(state_dict)
    if not is_static(state_dict):
        return state_dict
    for name, stage in graph_stages(model).items():
        if not all(f"{name}.{key}" in state_dict for key in stage.state_dict() if is_static([f".{key}"])):
            continue  # a part of a network (a head, say) is no static network: what it does not hold stays
        if not (stage.edge_scale and stage.block_shortcut and stage.is_complete()):
            raise ValueError(
                "a static checkpoint can't be loaded with edge_scale=False, block_shortcut=False or a random topology: "
                "such a network is another function from the start. Leave them at their defaults, or train it from "
                "scratch (pretrained=False)"
            )
        for child_name, child in stage.named_children():
            if isinstance(child, (Router, Projection)):
                if isinstance(child, Router):
                    child = copy.deepcopy(child)
                    child.reset_parameters(identity=True)
                for key, value in child.state_dict().items():
                    state_dict[f"{name}.{child_name}.{key}"] = value
    return state_dict


def check_fit(model: nn.Module, state_dict: Mapping[str, Any], within: tuple[str, ...] = ("",)) -> None:
    """Compare names and shapes before anything is copied.

    Args:
        within: prefixes of the keys to compare; all by default.

    Raises:
        RuntimeError: naming the missing, unexpected (with the nearest right one) and mis-shaped keys.
    """
    own = {key: value for key, value in model.state_dict().items() if key.startswith(within)}
    given = {key: value for key, value in state_dict.items() if key.startswith(within)}
    missing = [key for key in own if key not in given]
    extra = [key for key in given if key not in own]
    shapes = [
        f"'{key}': {tuple(given[key].shape)} in the checkpoint, {tuple(value.shape)} in the model"
        for key, value in own.items()
        if isinstance(value, Tensor) and key in given and given[key].shape != value.shape
    ]
    problems = []
    if missing:
        problems.append(f"missing {_some(repr(key) for key in missing)}")
    if extra:
        problems.append(f"unexpected {_some(_with_nearest(key, missing or list(own)) for key in extra)}")
    if shapes:
        problems.append(f"mis-shaped {_some(shapes)}")
    if problems:
        raise RuntimeError(
            f"this checkpoint does not fit {type(model).__name__}: {'; '.join(problems)}. Nothing was loaded; check "
            f"that the model's name and options (num_classes, {', '.join(GRAPH_OPTIONS)}) are those of the checkpoint"
        )


def _some(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:_MOST]) + (f" and {len(items) - _MOST} more" if len(items) > _MOST else "")


def _with_nearest(key: str, candidates: list[str]) -> str:
    nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
    return f"'{key}'" + (f" (nearest: '{nearest[0]}')" if nearest else "")
