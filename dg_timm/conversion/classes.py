"""Classes of dynamic networks: timm's class, with what a dynamic network answers differently.

``dynamic_class(ResNet)`` is ``DGResNet``. Every such class can be imported from here by its name, in a fresh process
too: ``from dg_timm.conversion.classes import DGResNet``. So models can be pickled, copied, and sent to other processes,
and a class of a user's own may derive from one.
"""

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import timm.models
import torch
from torch import nn

from dg_timm.conversion import state_dict as _state_dict
from dg_timm.conversion.blocks import undo_zero_init
from dg_timm.graph.stage import graph_stages, routers


class DynamicGraph:
    """What a dynamic graph network answers differently from its static class (mixed in before that class)."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's own, and every edge scale and threshold."""
        static: set[str] = getattr(super(), "no_weight_decay", set)()
        own = {
            f"{name}.{key}"
            for name, router in routers(self).items()  # type: ignore[arg-type]
            for key, _ in router.named_parameters()  # pruned or parametrized, they have other names
            if not key.startswith("fc.") and key != "logits"
        }
        return set(static) | own

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; a static state dict loads as the identity, and one that does not fit is not half-loaded."""
        if strict:
            completed = _state_dict.to_identity(self, state_dict)  # type: ignore[arg-type]
            _state_dict.check_fit(self, completed)  # type: ignore[arg-type]
        return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]


# Mixed in where timm's class has the method.


class Checkpointed:
    """Gradient checkpointing."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every node's input and block in the backward pass instead of keeping their activations.

        Parts of the network that are no graph follow timm. Outputs and gradients do not change. As everywhere with
        recomputation, BatchNorm sees each training batch twice when it tracks its running statistics.
        """
        super().set_grad_checkpointing(enable)  # type: ignore[misc]
        stages = graph_stages(self)  # type: ignore[arg-type]
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if name in stages:
                module.grad_checkpointing = enable
            elif any(stage.startswith(f"{name}." if name else "") for stage in stages):
                # timm's own would iterate the blocks of a graph and never run it
                module.grad_checkpointing = False


class Grouped:
    """Groups of parameters, for layer-wise learning rates."""

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], Any]:
        """timm's groups, with each router in its block's (router0 and projection in that of block 1)."""
        static = super().group_matcher(coarse=coarse)  # type: ignore[misc]
        anchors = {
            f"{name}.{added}": f"{name}.{block}.{next(iter(dict(stage.get_submodule(block).named_parameters())))}"
            for name, stage in graph_stages(self).items()  # type: ignore[arg-type]
            for added, block in stage.added_modules().items()
        }
        if callable(static):

            def group(key: str) -> Any:
                return static(next((a for prefix, a in anchors.items() if key.startswith(f"{prefix}.")), key))

            return group
        matcher: dict[str, list[tuple[str, Any]]]
        matcher = {group: [(spec, None)] if isinstance(spec, str) else list(spec) for group, spec in static.items()}
        for prefix, anchor in anchors.items():
            match = _first_match(matcher, anchor)
            if match is not None:  # otherwise timm puts the block last, and its router with it
                matcher[match[0]].insert(0, (rf"^{re.escape(prefix)}\.", match[1]))
        return matcher


class Initializable:
    """Weights that can start again."""

    @torch.jit.ignore
    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """timm's, then every graph from its start again."""
        super().init_weights(*args, **kwargs)  # type: ignore[misc]
        for stage in graph_stages(self).values():  # type: ignore[arg-type]
            stage.reset_graph_parameters()
            if not stage.block_shortcut:
                for name in stage.block_names:
                    undo_zero_init(stage.get_submodule(name))


def _first_match(matcher: Mapping[str, list[tuple[str, Any]]], key: str) -> tuple[str, tuple[Any, ...]] | None:
    """The group that timm would put ``key`` in, and its ordinal there; None if it is in none."""
    for group, specs in matcher.items():
        for pattern, suffix in specs:
            match = re.match(pattern, key)
            if match:
                return group, tuple(g for g in match.groups() if g is not None) + tuple(suffix or ())
    return None


_of_this_package: dict[str, type[nn.Module]] = {}


def give_name(static: type[nn.Module]) -> type[nn.Module]:
    """Let the dynamic form of a class that timm lacks be named ``DG`` and its name; a decorator for this package's."""
    _of_this_package[static.__name__] = static
    return static


def _named(name: str) -> Any:
    return _of_this_package.get(name) or getattr(timm.models, name, None)


@functools.cache
def dynamic_class(static: type[nn.Module]) -> type[nn.Module]:
    """The dynamic form of a timm class, or of a class derived from one."""
    optional = {"init_weights": Initializable, "group_matcher": Grouped, "set_grad_checkpointing": Checkpointed}
    mixins = (DynamicGraph, *(mixin for method, mixin in optional.items() if hasattr(static, method)))
    name = _name_of(static)
    doc = f"timm's {static.__name__} as a dynamic graph network."
    return type(name, (*mixins, static), {"__module__": __name__, "__qualname__": name, "__doc__": doc})


def _name_of(static: type[nn.Module]) -> str:
    """``DGResNet``; with the module, ``DGMine@my:module``, where timm does not export a class of that name."""
    if _named(static.__name__) is static:
        return f"DG{static.__name__}"
    return f"DG{static.__qualname__.replace('.', '/')}@{static.__module__.replace('.', ':')}"  # pickle splits at dots


def __getattr__(name: str) -> type[nn.Module]:
    """Make the class of this name, so that it can be imported before a model of it was made."""
    if name.startswith("DG"):
        qualified, _, module = name.removeprefix("DG").partition("@")
        try:
            found: Any = importlib.import_module(module.replace(":", ".")) if module else _named(qualified)
            for part in qualified.split("/") if module else ():
                found = getattr(found, part)
            if isinstance(found, type) and issubclass(found, nn.Module):
                return dynamic_class(found)  # type: ignore[arg-type]
        except (ImportError, AttributeError):
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
