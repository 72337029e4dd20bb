"""A cascade: every image runs at a small budget, and those that the network is unsure of run again at a larger one.

Certainty finds hard images better than gates do, so that compute follows difficulty. Both passes are of one network.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dg_timm import _compat
from dg_timm._errors import BadState, BadType, BadValue
from dg_timm.execution import operators
from dg_timm.execution.passes import Pass, forget, may_reuse
from dg_timm.graph.context import request, requesting
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import DGStage, require_dynamic

# How sure a network is of an image, from its logits (batch, classes): (batch,), higher is surer
CERTAINTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": lambda logits: logits.float().softmax(1).amax(1),
    "margin": lambda logits: _margin(logits.float().softmax(1)),
    "entropy": lambda logits: -torch.special.entr(logits.float().softmax(1)).sum(1),
}

_HIGHEST = {"probability": 1, "margin": 1, "entropy": 0}


def _margin(probabilities: Tensor) -> Tensor:
    best = probabilities.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


@dataclass(frozen=True)
class Cascade:
    """The passes of a cascade.

    Attributes:
        budgets: of the gates, ascending; the last one may be None, for every gate open.
        threshold: of the certainty, below which an image goes on to the next pass.
        certainty: one of ``CERTAINTIES``.
    """

    budgets: tuple[float | None, ...]
    threshold: float
    certainty: str = "probability"

    def unsure(self, logits: Tensor) -> Tensor:
        """Say which images go on: (batch, classes) -> (batch,) bool. What is no number goes on."""
        return ~(CERTAINTIES[self.certainty](logits) >= self.threshold)


def set_cascade(
    model: nn.Module,
    budgets: Sequence[float | None] | None,
    threshold: float = 0.9,
    certainty: str = "probability",
) -> None:
    """Run every image at the first budget, and again at the next one while the network is unsure of it.

    It works in every execution, in eval mode, in calls of the model itself; in training and of ``forward_features`` one
    pass runs, at the first budget, and :func:`dg_timm.adjacency` is that of the first pass. Hooks of the model see the
    first pass. The setting is saved in config.json.

    In sparse execution a later pass starts behind the leading stages of which an image skipped no block: what they give
    is the same. :func:`dg_timm.cost` counts it so.

    Args:
        model: a classifier with gates.
        budgets: of the gates (:attr:`dg_timm.graph.gate.Gate.budget`), ascending; None as the last one opens every
            gate. None in place of a list ends the cascade.
        threshold: of the certainty, in its range.
        certainty: ``probability`` of the best class (0..1), its ``margin`` over the second (0..1), or (negative)
            ``entropy`` in nats (at most 0).

    Raises:
        BadType: if a budget or the threshold is no number.
        BadValue: if the network has no gates, or a value is out of range. The model is then left as it was.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18", gates=True, num_classes=10).eval()
    >>> dg_timm.set_cascade(model, (0.0, 1.0), threshold=0.9)
    >>> bool((dg_timm.cost(model, torch.randn(2, 3, 64, 64)) > 1.05).all())  # it is sure of nothing: both passes
    True
    """
    require_dynamic(model)
    if budgets is None:
        _install(model, None)
        return
    if not gates(model):
        raise BadValue("a cascade runs over budgets of gates, and this network has none (gates=True)")
    if getattr(model, "num_classes", 0) < 2:
        raise BadValue(
            f"a cascade asks how sure a classifier of two classes or more is, and {type(model).__name__} is none; of a "
            "wrapper, give the model inside (model.module)"
        )
    chosen = _check_budgets(budgets)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)):
        raise BadType(f"threshold must be a number, got {threshold!r}")
    if not isinstance(certainty, str) or certainty not in CERTAINTIES:
        raise BadValue(f"certainty must be one of {', '.join(CERTAINTIES)}, got {certainty!r}")
    if not threshold <= _HIGHEST[certainty]:
        raise BadValue(
            f"the certainty by {certainty} is at most {_HIGHEST[certainty]}, so threshold {threshold:g} is never "
            f"reached; give e.g. {_HIGHEST[certainty] - 0.5:g}"
        )
    _install(model, Cascade(chosen, float(threshold), certainty))


def _check_budgets(budgets: Sequence[float | None]) -> tuple[float | None, ...]:
    if not isinstance(budgets, (list, tuple)) or len(budgets) < 2:
        raise BadValue(f"a cascade needs at least two budgets, got {budgets!r}")
    for k, budget in enumerate(budgets):
        if budget is None and k == len(budgets) - 1:
            continue
        if isinstance(budget, bool) or not isinstance(budget, (int, float, np.number)):
            raise BadType(f"budgets must be numbers (the last one may be None), got {budget!r}")
        if not 0 <= budget <= 1:
            raise BadValue(f"budgets lie between 0 and 1, got {budget:g}")
    numbers = [float(budget) for budget in budgets if budget is not None]
    if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
        raise BadValue(f"budgets of a cascade must ascend, got {list(budgets)}")
    return tuple(None if budget is None else float(budget) for budget in budgets)


def cascade_of(model: nn.Module) -> Cascade | None:
    """The cascade of a model, or None."""
    stage = _first_stage(model)
    return None if stage.cascade is None else Cascade(**{**stage.cascade, "budgets": tuple(stage.cascade["budgets"])})


def _first_stage(model: nn.Module) -> DGStage:
    """The first stage, which has the settings of all: every call asks, and does not walk through the whole model."""
    found = next((module for module in model.modules() if isinstance(module, DGStage)), None)
    return found or next(iter(require_dynamic(model).values()))


def _install(model: nn.Module, cascade: Cascade | None) -> None:
    if cascade is None and cascade_of(model) is None:
        return  # a budget that was set stays
    forget(model)
    for hook in (_begin, _run_next_passes):
        _compat.remove_forward_hook(model, hook)
    settings = None
    if cascade is not None:
        settings = dict(budgets=list(cascade.budgets), threshold=cascade.threshold, certainty=cascade.certainty)
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_run_next_passes, with_kwargs=True, always_call=True)
    for stage in require_dynamic(model).values():
        stage.cascade = settings
    for gate in gates(model).values():
        gate.budget = 1.0 if cascade is None else cascade.budgets[0]


def _begin(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook before the first pass: let it keep what later passes need not run again."""
    asked, stage = request(), _first_stage(model)
    images = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if model.training or asked.sets_budget or asked.recorder is not None or images is None:
        return
    if (asked.execution or stage.execution) == "sparse" and operators.has_values(images):
        first = Pass(torch.arange(len(images)))
        first.leave.enter_context(requesting(passes=first))


def _run_next_passes(model: nn.Module, args: tuple, kwargs: dict[str, Any], logits: Tensor | None) -> Tensor | None:
    """A hook after the first pass, which gave ``logits``; None if it raised."""
    asked, cascade = request(), cascade_of(model)
    if model.training or cascade is None or asked.sets_budget:
        return None
    current = asked.passes
    if isinstance(current, Pass):
        current.leave.close()
    if logits is None or logits.is_meta:
        return None
    (images,) = (*args, *kwargs.values())
    if not operators.has_values(images):
        raise BadState(
            "a cascade chooses what to run by the image and can't be traced, exported or transformed; "
            "dg_timm.set_cascade(model, None) first"
        )
    if asked.recorder is not None:
        asked.recorder.later.clear()  # of the forward pass before
    some = torch.arange(len(logits), device=logits.device)
    if not bool(cascade.unsure(logits).any()):
        return None
    if not may_reuse(model):
        current = None
    for budget in cascade.budgets[1:]:
        some = some[cascade.unsure(logits[some])]
        if len(some) == 0:
            break
        if isinstance(current, Pass):
            current = current.begin_next(some.cpu())
            some = current.images.to(some.device)  # for the others nothing would change, at any larger budget
        logits = _run_again(model, images, logits, some, budget, current)
    return logits


def _run_again(
    model: nn.Module, images: Tensor, logits: Tensor, some: Tensor, budget: float | None, current: Any
) -> Tensor:
    """Run some images again at a budget, and put their logits in place of those before."""
    if len(some) == 0:
        return logits
    recorder = request().recorder
    starting = some if current is None else current.starting.to(some.device)
    following = None if recorder is None else recorder.begin_pass(some)
    with requesting(sets_budget=True, budget=budget, recorder=following, passes=current):
        again = model.forward(images[starting])
    return logits.index_put((some,), again.to(logits.dtype))
