"""The networks that are timed: each is built, and compared with what it must give."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

import dg_timm
from dg_timm._errors import BadValue
from dg_timm.benchmarks.equivalence import check_close, check_exact
from dg_timm.benchmarks.imposed import ImposedModel, complete_topology, open_all_edges
from dg_timm.benchmarks.memory import check_memory, memory_needed
from dg_timm.benchmarks.setting import Setting
from dg_timm.execution.operators import using_backend
from dg_timm.execution.settings import EXECUTIONS
from dg_timm.models.registry import BUNDLED
from dg_timm.training.run import networks

_COMPARED = 8  # images on which an identity conversion is compared with the static network


def _no_cost() -> float | None:
    return None


@dataclass
class Candidate:
    """A network that takes part in the rounds.

    Attributes:
        spec: its name, with the execution after a colon.
        model: the network.
        prepare: called before every round; returns what the paths that it draws cost, relative to the static network,
            or None if it draws none.
        milliseconds: of an image, by round.
        costs: of the images, by round.
    """

    spec: str
    model: nn.Module
    prepare: Callable[[], float | None] = _no_cost
    milliseconds: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)


def split_spec(spec: str) -> tuple[str, str]:
    """Split a name from the execution after its last colon, which is empty if there is none."""
    name, _, execution = spec.rpartition(":")
    return (name, execution) if name and execution in EXECUTIONS else (spec, "")


def is_trained(spec: str) -> bool:
    """Tell whether a network is timed with the weights that it learned: it is saved in a folder, or ships."""
    name = split_spec(spec)[0]
    return name in BUNDLED or networks.implies_pretrained(name)


def is_dynamic(spec: str) -> bool:
    """Tell whether a name or folder is that of a dynamic network."""
    return networks.architecture_of(split_spec(spec)[0]).startswith("dg_")


def static_name(spec: str) -> str:
    """Name the static network of a dynamic one: ``dg_resnet18.a1_in1k:sparse`` -> ``resnet18``."""
    return networks.architecture_of(split_spec(spec)[0]).partition(".")[0].removeprefix("dg_")


def with_static_networks(specs: list[str]) -> list[str]:
    """List the static networks of the dynamic ones, then all that was asked for; each once."""
    return list(dict.fromkeys([static_name(spec) for spec in specs if is_dynamic(spec)] + specs))


def create(spec: str, setting: Setting, **weights: Any) -> nn.Module:
    """Make a network of timm or the zoo on the setting's device, in its layout and mode, in dense execution."""
    torch.manual_seed(0)
    name = split_spec(spec)[0]
    if is_trained(spec):
        model = networks.create(name, pretrained=name in BUNDLED)
    else:
        model = timm.create_model(name, **weights)
    return model.to(setting.device).to(memory_format=setting.memory_format).train(setting.trains)


def build_candidate(spec: str, setting: Setting, images: Tensor, others: Mapping[str, Candidate]) -> Candidate:
    """Build a network, and see that it predicts what it must.

    Args:
        spec: its name, with the execution after a colon.
        setting: under which it is timed.
        images: one batch.
        others: those that are built already; the static network of a dynamic one must be among them.

    Raises:
        BadValue: if it does not fit into memory, or does not take images of this size.
        NotEquivalent: if it predicts something else.
    """
    if is_dynamic(spec):
        return _build_dynamic(spec, setting, images, others[static_name(spec)].model)
    model = create(spec, setting)
    try:
        needed = memory_needed(model, setting)
    except (AssertionError, RuntimeError) as error:  # whatever a model of timm says of another size
        raise BadValue(f"{spec} does not take images of {setting.image_size} px: {error}") from error
    check_memory(spec, needed, setting)
    return Candidate(spec, model)


@torch.no_grad()
def _build_dynamic(spec: str, setting: Setting, images: Tensor, static: nn.Module) -> Candidate:
    weights = dict(state_dict=static.state_dict())
    model = create(spec, setting, pretrained=True, pretrained_cfg_overlay=weights).eval()
    check_memory(spec, memory_needed(model, setting), setting)
    few = images[:_COMPARED]
    if not is_trained(spec):
        static.eval()
        check_exact(spec, model(few), static(few), "as its static network")
        static.train(setting.trains)
    if (not is_trained(spec) and setting.edges == "open") or setting.removed is not None:
        open_all_edges(model)
    execution = split_spec(spec)[1] or "dense"
    imposed: ImposedModel | None = None
    prepare: Callable[[], float | None] = _no_cost
    if setting.removed is not None:
        imposed = ImposedModel(model, execution, setting.input_size)
        prepare = functools.partial(imposed.draw, setting.batch_size, setting.removed)
        prepare()
        dg_timm.set_execution(model, "dense")
    with using_backend("reference"):
        expected = model(images)
    if imposed is not None:
        imposed.set_execution()
    else:
        dg_timm.set_execution(model, execution, complete_topology(model) if execution == "fixed" else None)
    check_close(spec, model(images), expected, "as the reference formulas")
    return Candidate(spec, model.train(setting.trains), prepare)
