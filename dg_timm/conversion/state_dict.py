"""Between static and dynamic state dicts: complete a static one to the identity, and name what does not fit.

``nn.Module.load_state_dict`` asks the hooks below, of every network and every stage, wherever they lie in a parent. A
state dict that holds every tensor of the static stages and none of a graph is that of a static network, and becomes
the identity. A part of one is not: graphs that it does not mention stay as they are, and are reported as missing. A
static state dict of another architecture is refused, also with ``strict=False``: what fits of it would be mixed in.
"""

import copy
import difflib
import re
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from dg_timm._errors import BadState, BadValue
from dg_timm.conversion.blocks import Projection
from dg_timm.graph.gate import OPEN_BIAS, OPEN_SHIFT, Gate, gates
from dg_timm.graph.router import Router
from dg_timm.graph.stage import GRAPH_OPTIONS, DGStage, graph_stages, routers

_MAX_KEYS_SHOWN = 8
_GRAPH_KEY = re.compile(r"(^|\.)(router\d+|gate\d+|projection)\.")


def is_static(state_dict: Iterable[str]) -> bool:
    """Say whether these are the keys of a static network: none is a router's, a gate's or a projection's."""
    return not any(_GRAPH_KEY.search(key) for key in state_dict)


def is_identity(model: nn.Module) -> bool:
    """Say whether every stage is the static one: the chain at weight 1 and open, every other edge at 0, no gate closes.

    Learned thresholds count, and a threshold that :func:`dg_timm.set_threshold` put in force; so do blocks that were
    left out, and edges that fixed execution leaves out. A router whose layer was replaced is none of an identity. What
    blocks compute, and hooks, are not looked at: it is the graph that is an identity, whatever its blocks are.

    Raises:
        BadState: if the model has no numbers (it is on the meta device).
    """
    if any(parameter.is_meta for router in routers(model).values() for parameter in router.parameters()):
        raise BadState("a model on the meta device has no numbers to look at; load its weights first")
    return (
        all(_is_always_open(gate) for gate in gates(model).values())
        and all(_is_whole(stage) for stage in graph_stages(model).values())
        and all(router.is_identity() for router in routers(model).values())
    )


def _is_whole(stage: DGStage) -> bool:
    return stage.is_complete() and stage.topology == stage.edges and not stage.skipped_blocks()


def _is_always_open(gate: Gate) -> bool:
    if gate.budget is None:
        return True
    bias = float(gate.fc.bias.detach()) + float(gate.shift.detach()) * (1 - gate.budget)
    return not bool(gate.fc.weight.any()) and bias >= 0


def to_identity(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Complete a static state dict to that of the identity conversion, and one without gates by open gates.

    Any other comes back as it is.

    Args:
        model: a dynamic network, or a stage.
        state_dict: of it, or of a parent.
        prefix: of the model's keys in it.

    Raises:
        BadValue: if the model's options leave no identity (``edge_scale=False``, ``block_shortcut=False`` or a random
            topology).
    """
    completed = dict(state_dict)
    if not holds_static(model, completed, prefix):
        return _with_open_gates(model, completed, prefix)
    for name, stage in graph_stages(model).items():
        if not (stage.edge_scale and stage.block_shortcut and stage.is_complete()):
            raise BadValue(
                "a static checkpoint can't be loaded with edge_scale=False, block_shortcut=False or a random topology: "
                "such a network is another function from the start. Leave them at their defaults, or train it from "
                "scratch (pretrained=False)"
            )
        where = f"{prefix}{name}." if name else prefix
        like = next(value for key, value in completed.items() if key.startswith(where) and isinstance(value, Tensor))
        completed |= {f"{where}{key}": value for key, value in _identity_of(stage, like).items()}
    return completed


def _with_open_gates(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Add open gates to the stages of a dynamic network that was saved without any: it stays the same function."""
    for name, stage in graph_stages(model).items():
        where = f"{prefix}{name}." if name else prefix
        own = {f"{where}{key}": value for key, value in stage.state_dict().items()}
        of_gates = {key for key in own if re.match(r"gate\d+\.", key.removeprefix(where))}
        present = own.keys() & state_dict.keys()
        if of_gates and not present & of_gates and present == own.keys() - of_gates:
            like = state_dict[next(iter(present))]
            open_gates = {f"{where}{key}": value for key, value in _identity_of(stage, like).items()}
            state_dict |= {key: open_gates[key] for key in of_gates}
    return state_dict


def holds_static(model: nn.Module, keys: Iterable[str], prefix: str = "") -> bool:
    """Say whether ``keys`` has every tensor of the static stages of a model, and none of their graphs."""
    keys = set(keys)
    stages = graph_stages(model)
    for name, stage in stages.items():
        where = f"{prefix}{name}." if name else prefix
        added = tuple(f"{where}{child}." for child in stage.added_modules())
        # old checkpoints do not count batches
        own = {f"{where}{key}" for key in stage.state_dict() if not key.endswith("num_batches_tracked")}
        if any((key in keys) == key.startswith(added) for key in own):
            return False
        inside = {key for key in keys if key.startswith(where) and not key.endswith("num_batches_tracked")}
        if inside - own:  # of another, larger network
            return False
    return bool(stages)


def _identity_of(stage: DGStage, like: Tensor) -> dict[str, Tensor]:
    """What a graph adds to a stage, at its start from the static network; on the device of ``like``.

    The stage may be on the meta device, so nothing is taken from its tensors but shapes.
    """
    added: dict[str, Tensor] = {}
    device = torch.device("cpu") if like.is_meta else like.device
    for name in stage.added_modules():
        module = stage.get_submodule(name)
        for key, value in module.state_dict().items():
            added[f"{name}.{key}"] = torch.zeros(value.shape, dtype=value.dtype, device=device)
        if isinstance(module, Router):
            scale = added[f"{name}.scale"]
            added[f"{name}.scale"] = module.initial_scale(identity=True).to(scale)
        elif isinstance(module, Gate):
            added[f"{name}.fc.bias"].fill_(OPEN_BIAS)
            added[f"{name}.shift"].fill_(OPEN_SHIFT)
        elif isinstance(module, Projection):
            fresh = copy.deepcopy(module).to_empty(device="cpu")
            for buffer in fresh.buffers():
                buffer.zero_()
            fresh.reset_parameters()
            added |= {f"{name}.{key}": value.to(device) for key, value in fresh.state_dict().items()}
    return added


def complete_network(
    model: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: dict, *_: object
) -> None:
    """A load hook of a dynamic network: a static state dict becomes the identity, below any parent."""
    _refuse_another(model, state_dict, prefix)
    state_dict.update(to_identity(model, state_dict, prefix))
    # what is a part of a network for all of it must not look whole to one of its stages
    is_part = is_static(key for key in state_dict if key.startswith(prefix))
    for name, stage in graph_stages(model).items():
        stage.loading = _identities(state_dict, f"{prefix}{name}." if name else prefix) if is_part else frozenset()


def complete_stage(
    stage: DGStage, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: dict, *_: object
) -> None:
    """A load hook of a stage that is loaded without its network."""
    part, stage.loading = stage.loading, frozenset()
    if part and part == _identities(state_dict, prefix):  # the network has seen it
        return
    _refuse_another(stage, state_dict, prefix)
    state_dict.update(to_identity(stage, state_dict, prefix))


def _identities(state_dict: Mapping[str, Any], prefix: str) -> frozenset[int]:
    return frozenset(id(value) for key, value in state_dict.items() if key.startswith(prefix))


def _refuse_another(model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Refuse a static state dict of another architecture, before any tensor of this network or stage is copied.

    A part of the own one is welcome, and so is a whole one with more beside the stages (a head that was left out). Few
    tensors are no architecture: what is not the model's among them is for torch to report.

    Raises:
        BadState: naming the tensors that are not the model's or of another shape, or the blocks that are missing.
    """
    given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not is_static(given):
        return
    own = model.state_dict()
    problems = _mis_shaped(own, given)
    if not holds_static(model, given):
        if 2 * len(given) >= sum(is_static([key]) for key in own):
            problems += [f"'{prefix}{key}', which the model has not" for key in given if key not in own]
        problems += _missing_blocks(model, given)
    if problems:
        raise BadState(
            f"this static checkpoint is of another architecture than {type(model).__name__}: {_listed(problems)}. "
            "Nothing of this network was loaded (a parent may have loaded what comes before it); load one of the same "
            "architecture, or leave out the tensors that do not fit"
        )


def _missing_blocks(model: nn.Module, given: Iterable[str]) -> list[str]:
    """What a network of the same names, with fewer or simpler blocks, lacks.

    That is blocks, where every stage has some whole and others not at all; or tensors in blocks, where all blocks are
    there and each lacks some. Anything else may be a part of the own architecture.
    """
    given, missing, inside, is_some_whole = set(given), list[str](), list[str](), False
    for name, stage in graph_stages(model).items():
        present = False
        for block in (*stage.entry_names, *stage.block_names):
            where = f"{name}.{block}." if name else f"{block}."
            keys = {f"{where}{key}" for key in stage.get_submodule(block).state_dict() if "num_batches" not in key}
            if keys and not keys & given:
                missing.append(f"no tensor of '{where.rstrip('.')}'")
            is_some_whole = is_some_whole or keys <= given
            inside += [f"no tensor '{key}'" for key in sorted(keys - given) if keys & given]
            present = present or bool(keys & given)
        if not present:
            return []
    if missing and inside:
        return []
    return missing or ([] if is_some_whole else inside)


def register_hooks(model: nn.Module) -> None:
    """Let a dynamic network and its stages complete static state dicts."""
    model.register_load_state_dict_pre_hook(complete_network)
    for stage in graph_stages(model).values():
        stage.on_load(complete_stage)


def check_fit(model: nn.Module, state_dict: Mapping[str, Any], within: tuple[str, ...] = ("",)) -> None:
    """Compare names and shapes before anything is copied.

    Args:
        model: what is going to be loaded.
        state_dict: what it is going to be loaded with.
        within: prefixes of the keys to compare; all by default.

    Raises:
        BadState: naming the missing, unexpected (with the nearest right one) and mis-shaped keys.
    """
    own = {key: value for key, value in model.state_dict().items() if key.startswith(within)}
    given = {key: value for key, value in state_dict.items() if key.startswith(within)}
    missing = [key for key in own if key not in given]
    extra = [key for key in given if key not in own]
    shapes = _mis_shaped(own, given)
    problems = []
    if missing:
        problems.append(f"missing {_listed(repr(key) for key in missing)}")
    if extra:
        problems.append(f"unexpected {_listed(_with_nearest(key, missing or list(own)) for key in extra)}")
    if shapes:
        problems.append(f"mis-shaped {_listed(shapes)}")
    if problems:
        raise BadState(
            f"this checkpoint does not fit {type(model).__name__}: {'; '.join(problems)}. Nothing was loaded; check "
            f"that the model's name and options (num_classes, {', '.join(GRAPH_OPTIONS)}) are those of the checkpoint"
        )


def _mis_shaped(own: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return [
        f"'{key}': {tuple(given[key].shape)} in the checkpoint, {tuple(value.shape)} in the model"
        for key, value in own.items()
        if isinstance(value, Tensor) and isinstance(given.get(key), Tensor) and given[key].shape != value.shape
    ]


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _MAX_KEYS_SHOWN} more" if len(items) > _MAX_KEYS_SHOWN else ""
    return ", ".join(items[:_MAX_KEYS_SHOWN]) + more


def _with_nearest(key: str, candidates: list[str]) -> str:
    nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
    return f"'{key}'" + (f" (nearest: '{nearest[0]}')" if nearest else "")
