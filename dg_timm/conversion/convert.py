"""``dynamize``: turn a timm model, in place, into a dynamic graph network (paper 3.1-3.2)."""

import warnings
from typing import Tuple

import torch
from torch import Tensor, nn

from dg_timm import _compat
from dg_timm._errors import BadType, BadValue
from dg_timm.conversion import blocks, state_dict
from dg_timm.conversion.classes import dynamic_class
from dg_timm.conversion.find import find_stages
from dg_timm.execution.engine import run_stage
from dg_timm.graph.plan import StagePlan
from dg_timm.graph.stage import DGStage, graph_stages
from dg_timm.graph.topology import Topology, build_topology


def dynamize(
    model: nn.Module,
    *,
    identity: bool = True,
    edge_scale: bool = True,
    block_shortcut: bool = True,
    instance_aware: bool = True,
    gates: bool = False,
    topology: Topology = "complete",
    topology_seed: int = 0,
) -> nn.Module:
    """Give every stage of a timm model a graph of its own for each image; in place, and returned.

    The model stays an instance of timm's class with timm's names; its static state dict still loads, as the identity.

    Args:
        model: any timm model whose stages are runs of convolutional blocks, also one made with ``features_only``.
        identity: start as the static network, bit for bit. False: every node starts from its predecessors' mean.
        edge_scale: False drops the learned scale of each edge; weights are then the paper's alpha. Needs
            ``identity=False``, and belongs with ``block_shortcut=False``.
        block_shortcut: False drops the blocks' own shortcuts, so that the graph's edges replace them (ResNet, RegNet
            and MobileNetV2-like blocks). Needs ``identity=False``.
        instance_aware: False learns one weight an edge, the same for every image (the paper's ablation, Table 6).
        gates: give every block a gate, by which an image can skip it; its node then passes on what it read. All are
            open at the start; train them with a cost target (``--target-cost``).
        topology: the edges of a stage: ``complete``; ``er``, ``ba`` or ``ws``, the random graphs of Table 4
            (:mod:`dg_timm.graph.topology`; needs ``identity=False`` and networkx); or the sources of every node by
            stage, ``{"layer1": [[], [0], [0, 1], ...], ...}``, as in the configuration of a saved network.
        topology_seed: of a random graph; every stage draws its own.

    Raises:
        BadType: if ``model`` is not a timm model, or an option has another type.
        MissingPackage: if a random graph needs networkx, and it is missing.
        BadValue: if it is dynamic already, has no stage to convert, or the options exclude each other. Whatever is
            raised, the model is then left as it was.

    >>> import dg_timm, timm, torch
    >>> model, images = timm.create_model("resnet18").eval(), torch.randn(2, 3, 64, 64)
    >>> before = model(images)
    >>> torch.equal(dg_timm.dynamize(model)(images), before)
    True
    """
    options = dict(
        identity=identity, edge_scale=edge_scale, block_shortcut=block_shortcut, instance_aware=instance_aware
    )
    _check_options(**options)
    options["gates"] = _checked_flag("gates", gates)
    if identity and topology != "complete":
        raise BadValue(
            f"identity conversion needs the complete topology, got {topology!r}: pass identity=False to train from "
            "scratch"
        )
    _check_model(model)
    checkpointing = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
    _set_checkpointing(model, checkpointing, False)  # it would hide the dataflow by which stages are found
    try:
        _replace_stages(model, _make_stages(model, topology, topology_seed, options))
    finally:
        _set_checkpointing(model, checkpointing, True)
    return model


def _set_checkpointing(model: nn.Module, is_used: bool, enable: bool) -> None:
    if is_used:
        model.set_grad_checkpointing(enable)  # type: ignore[operator]


def _make_stages(
    model: nn.Module, topology: Topology, seed: int, options: dict[str, bool]
) -> list[tuple[StagePlan, DGStage]]:
    """Make every stage that the model can have, and leave the model alone."""
    plans = find_stages(model)
    if not options["block_shortcut"]:
        _check_shortcuts(model, plans)
    edges = build_topology({plan.name: len(plan.blocks) for plan in plans}, topology, seed)
    return [(plan, _make_stage(model, plan, edges[plan.name], options)) for plan in plans]


def _replace_stages(model: nn.Module, stages: list[tuple[StagePlan, DGStage]]) -> None:
    """Put stages in place. Nothing here can fail: a model is never half-converted."""
    for plan, stage in stages:
        _put_in_place(model, plan, stage)
    model.__class__ = dynamic_class(type(model))  # type: ignore[arg-type]
    state_dict.register_hooks(model)
    if hasattr(model, "in_chans"):
        model.register_forward_pre_hook(_check_images)


def _make_stage(model: nn.Module, plan: StagePlan, topology: list[list[int]], options: dict[str, bool]) -> DGStage:
    container = model.get_submodule(plan.name)
    projection = None
    if plan.input_node == "projection":
        like = next(container.parameters())
        norm = blocks.output_norm(container.get_submodule(plan.blocks[0]))
        projection = blocks.Projection(
            plan.in_chs, plan.out_chs, plan.stride, len(plan.blocks), norm, device=like.device, dtype=like.dtype
        )
    return DGStage(container, plan, engine=run_stage, projection=projection, topology=topology, **options)


def adapt_blocks(stage: DGStage) -> None:
    """Change timm's blocks where the graph needs it: shortcuts that are given, or dropped."""
    for position, name in enumerate(stage.block_names):
        block, projects = stage.get_submodule(name), position == 0 and stage.input_node == "shortcut"
        if not stage.block_shortcut:
            blocks.drop_shortcut(block, projects)
        elif projects:
            blocks.give_shortcut(block, projects)


def _put_in_place(model: nn.Module, plan: StagePlan, stage: DGStage) -> None:
    adapt_blocks(stage)
    _compat.move_hooks(model.get_submodule(plan.name), stage)
    parent, _, child = plan.name.rpartition(".")
    setattr(model.get_submodule(parent), child, stage)


def _check_images(self: nn.Module, images: Tuple[Tensor]) -> None:
    # Without this a wrong rank or channel count surfaces deep in the stem, as another error for every family.
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles what follows only under the outer one)
        if torch.jit.is_tracing() or len(images) == 0 or not isinstance(images[0], Tensor):
            return  # traced, or passed by keyword: there is nothing here to look at
    shape = images[0].shape
    if len(shape) != 4:
        raise BadValue(f"expected images (batch, channels, height, width), got {len(shape)} dimensions")
    if shape[1] != self.in_chans:
        raise BadValue(f"expected images of {self.in_chans} channels, got {shape[1]}")


def _check_options(*, identity: bool, edge_scale: bool, block_shortcut: bool, instance_aware: bool) -> None:
    options = dict(
        identity=identity, edge_scale=edge_scale, block_shortcut=block_shortcut, instance_aware=instance_aware
    )
    for name, value in options.items():
        _checked_flag(name, value)
    if identity and not (edge_scale and block_shortcut):
        raise BadValue(
            "identity conversion needs edge_scale=True and block_shortcut=True: without them the network is another "
            "function from the start. Pass identity=False to train it from scratch"
        )
    if block_shortcut and not edge_scale:
        warnings.warn(
            "edge_scale=False sums every predecessor at weight 0.5; with the blocks' own shortcuts the signal grows by "
            "half at every node. It belongs with block_shortcut=False",
            stacklevel=3,
        )


def _checked_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise BadType(f"{name} must be True or False, got {value!r}")
    return value


def _check_model(model: nn.Module) -> None:
    is_timm = isinstance(model, nn.Module) and any(
        cls.__module__.split(".")[0] in ("timm", "dg_timm") for cls in type(model).__mro__
    )
    if not is_timm:
        raise BadType(
            f"expected a timm model, got {type(model).__module__}.{type(model).__qualname__}; "
            "make one with timm.create_model(...)"
        )
    if graph_stages(model):
        raise BadValue(f"this {type(model).__name__} is a dynamic graph network already; convert a static model")


def _check_shortcuts(model: nn.Module, plans: list[StagePlan]) -> None:
    for plan in plans:
        for name in plan.blocks:
            block = model.get_submodule(f"{plan.name}.{name}")
            if not blocks.can_drop_shortcut(block):
                raise BadValue(
                    f"block_shortcut=False is offered for ResNet, RegNet and MobileNetV2-like blocks; "
                    f"'{plan.name}.{name}' is a {type(block).__name__}"
                )
