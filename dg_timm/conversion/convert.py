"""``dynamize``: turn a timm model, in place, into a dynamic graph network (paper 3.1-3.2)."""

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from dg_timm.conversion import state_dict as checkpoint
from dg_timm.conversion.blocks import can_drop_shortcut
from dg_timm.conversion.find import StagePlan, find_stages
from dg_timm.graph.stage import DGStage
from dg_timm.graph.topology import Topology, build_topology

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip


def dynamize(
    model: nn.Module,
    *,
    identity: bool = True,
    edge_scale: bool = True,
    block_shortcut: bool = True,
    instance_aware: bool = True,
    topology: Topology = "complete",
    topology_seed: int = 0,
) -> nn.Module:
    """Give every stage of a timm model a graph of its own for each image; in place, and returned.

    The model stays an instance of timm's class with timm's attribute and parameter names; its static state dict is a
    subset of the new one and still loads (as the identity).

    Args:
        model: any timm model whose stages are runs of convolutional blocks, also one made with ``features_only``.
        identity: start as the static network, bit for bit. False: every node starts from the mean of its predecessors,
            for training from scratch.
        edge_scale: False drops the learned scale of each edge; weights are then the paper's alpha. Needs
            ``identity=False``, and belongs with ``block_shortcut=False``.
        block_shortcut: False drops the blocks' own shortcuts, so that the graph's edges replace them (ResNet, RegNet
            and MobileNetV2-like blocks). Needs ``identity=False``.
        instance_aware: False learns one weight an edge, the same for every image (the paper's ablation, Table 6).
        topology: the edges that a stage has: ``complete``; ``er``, ``ba`` or ``ws``, the random graphs of Table 4
            (:mod:`dg_timm.graph.topology`; needs ``identity=False`` and networkx); or the sources of every node by
            stage, ``{"layer1": [[], [0], [0, 1], ...], ...}``, as a saved network has them in its configuration.
        topology_seed: of a random graph; every stage draws its own.

    Raises:
        TypeError: if ``model`` is not a timm model, or an option has another type.
        ImportError: if a random graph needs networkx, and it is missing.
        ValueError: if it is dynamic already, has no stage to convert, or the options exclude each other. The model is
            then left as it was.
    """
    options: dict[str, bool] = dict(
        identity=identity, edge_scale=edge_scale, block_shortcut=block_shortcut, instance_aware=instance_aware
    )
    _check_options(**options)
    if identity and topology != "complete":
        raise ValueError(
            f"identity conversion needs the complete topology, got {topology!r}: pass identity=False to train from scratch"
        )
    if not isinstance(model, nn.Module) or not _is_timm(model):
        raise TypeError(
            f"expected a timm model, got {type(model).__module__}.{type(model).__qualname__}; "
            "make one with timm.create_model(...)"
        )
    if checkpoint.graph_stages(model):
        raise ValueError(f"this {type(model).__name__} is a dynamic graph network already; convert a static model")
    checkpointing = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
    if checkpointing:  # it would hide the dataflow by which stages are found
        model.set_grad_checkpointing(False)  # type: ignore[operator]
    try:
        plans = find_stages(model)
        if not block_shortcut:
            _check_shortcuts(model, plans)
        edges = build_topology({plan.name: len(plan.blocks) for plan in plans}, topology, topology_seed)
    except (ValueError, TypeError, ImportError):
        if checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        raise

    stages = [DGStage(model.get_submodule(p.name), p, topology=edges[p.name], **options) for p in plans]
    for plan, stage in zip(plans, stages, strict=True):  # nothing below can fail: the model is never half-converted
        stage.adapt_blocks(plan)
        parent, _, child = plan.name.rpartition(".")
        for hooks in _HOOKS:  # taps set on the static stage (timm's FeatureHooks) go on working
            setattr(stage, hooks, getattr(model.get_submodule(plan.name), hooks))
        setattr(model.get_submodule(parent), child, stage)
    model.__class__ = _dynamic_class(type(model))  # type: ignore[arg-type]
    if hasattr(model, "in_chans"):
        model.register_forward_pre_hook(_check_images)
    if checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model


def _check_images(self: nn.Module, images: Tuple[Tensor]) -> None:
    # Without this a wrong rank or channel count surfaces deep in the stem, as another error for every family.
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles what follows only under the outer one)
        if torch.jit.is_tracing() or len(images) == 0 or not isinstance(images[0], Tensor):
            return  # traced, or passed by keyword: there is nothing here to look at
    shape = images[0].shape
    if len(shape) != 4:
        raise ValueError(f"expected images (batch, channels, height, width), got {len(shape)} dimensions")
    if shape[1] != self.in_chans:
        raise ValueError(f"expected images of {self.in_chans} channels, got {shape[1]}")


def _check_options(*, identity: bool, edge_scale: bool, block_shortcut: bool, instance_aware: bool) -> None:
    options = dict(
        identity=identity, edge_scale=edge_scale, block_shortcut=block_shortcut, instance_aware=instance_aware
    )
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if identity and not (edge_scale and block_shortcut):
        raise ValueError(
            "identity conversion needs edge_scale=True and block_shortcut=True: without them the network is another "
            "function from the start. Pass identity=False to train it from scratch"
        )
    if block_shortcut and not edge_scale:
        warnings.warn(
            "edge_scale=False sums every predecessor at weight 0.5; with the blocks' own shortcuts the signal grows by "
            "half at every node. It belongs with block_shortcut=False",
            stacklevel=3,
        )


def _is_timm(model: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] in ("timm", "dg_timm") for cls in type(model).__mro__)


def _check_shortcuts(model: nn.Module, plans: list[StagePlan]) -> None:
    for plan in plans:
        for name in plan.blocks:
            block = model.get_submodule(f"{plan.name}.{name}")
            if not can_drop_shortcut(block):
                raise ValueError(
                    f"block_shortcut=False is offered for ResNet, RegNet and MobileNetV2-like blocks; "
                    f"'{plan.name}.{name}' is a {type(block).__name__}"
                )


class DynamicGraph:
    """What a dynamic graph network answers differently from its static class (mixed in before that class)."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's own, and every edge scale and threshold."""
        static: set[str] = getattr(super(), "no_weight_decay", set)()
        own = {
            f"{name}.{key}"
            for name, router in checkpoint.routers(self).items()  # type: ignore[arg-type]
            for key in ("scale", "threshold")
            if getattr(router, key) is not None
        }
        return set(static) | own

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but a static state dict loads as the identity, and one that does not fit is not half-loaded."""
        state_dict = checkpoint.to_identity(self, state_dict)  # type: ignore[arg-type]
        if strict:
            checkpoint.check_fit(self, state_dict)  # type: ignore[arg-type]
        return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time; a pickle names the static class, from which it can be made again.
        return _new, (type(self).__bases__[-1],), self.__dict__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


def _first_match(matcher: Mapping[str, list[tuple[str, Any]]], key: str) -> Optional[tuple[str, tuple[Any, ...]]]:
    """The group that timm would put ``key`` in, and its ordinal there; None if it is in none."""
    for group, specs in matcher.items():
        for pattern, suffix in specs:
            match = re.match(pattern, key)
            if match:
                return group, tuple(g for g in match.groups() if g is not None) + tuple(suffix or ())
    return None


# Mixed in where timm's class has the method.


class _Checkpointed:
    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every node's aggregation and block in the backward pass instead of keeping their activations.

        Parts of the network that are no graph follow timm. Outputs and gradients do not change; as everywhere with
        recomputation, BatchNorm sees each training batch twice when it tracks its running statistics.
        """
        super().set_grad_checkpointing(enable)  # type: ignore[misc]
        stages = checkpoint.graph_stages(self)  # type: ignore[arg-type]
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if name in stages:
                module.grad_checkpointing = enable
            elif any(stage.startswith(f"{name}." if name else "") for stage in stages):
                # timm's own would iterate the blocks of a graph and never run it
                module.grad_checkpointing = False


class _Grouped:
    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Union[dict[str, Any], Callable[[str], Any]]:
        """timm's groups, with each router in its block's (router0 and projection in that of block 1)."""
        static = super().group_matcher(coarse=coarse)  # type: ignore[misc]
        anchors = {
            f"{name}.{added}": f"{name}.{block}.{next(iter(dict(stage.get_submodule(block).named_parameters())))}"
            for name, stage in checkpoint.graph_stages(self).items()  # type: ignore[arg-type]
            for added, block in stage.graph_modules().items()
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


class _Initializable:
    @torch.jit.ignore
    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """timm's, then every graph from its start again."""
        super().init_weights(*args, **kwargs)  # type: ignore[misc]
        for stage in checkpoint.graph_stages(self).values():  # type: ignore[arg-type]
            stage.reset_graph_parameters()


@functools.cache
def _dynamic_class(static: type[nn.Module]) -> type[nn.Module]:
    optional = {"init_weights": _Initializable, "group_matcher": _Grouped, "set_grad_checkpointing": _Checkpointed}
    mixins = (DynamicGraph, *(mixin for method, mixin in optional.items() if hasattr(static, method)))
    return type(f"DG{static.__name__}", (*mixins, static), {"__module__": static.__module__, "__doc__": static.__doc__})


def _new(static: type[nn.Module]) -> nn.Module:
    cls = _dynamic_class(static)  # type: ignore[arg-type]
    return cls.__new__(cls)
