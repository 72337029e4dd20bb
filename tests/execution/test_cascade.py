"""Cascades: the images that a network is unsure of run again at a larger budget."""

import copy

import numpy as np
import pytest
import timm
import torch

import dg_timm
from dg_timm.analysis import counting
from dg_timm.analysis.recorder import recording
from dg_timm.execution import cascade
from dg_timm.execution.cascade import CERTAINTIES, cascade_of
from dg_timm.graph.context import requesting
from dg_timm.graph.gate import gates
from tests.helpers.networks import gated_network

BUDGETS = (0.0, 1.0)


def at(model, images, budget):
    with torch.no_grad(), requesting(sets_budget=True, budget=budget):
        return model(images)


def network():
    """A network, images, their logits at both budgets, and a threshold that half of the images do not reach."""
    model, images = gated_network()
    first, second = at(model, images, 0.0), at(model, images, 1.0)
    threshold = CERTAINTIES["probability"](first).median().item()
    return model, images, first, second, threshold


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_the_unsure_images_are_answered_by_the_larger_budget(execution):
    model, images, first, second, threshold = network()
    dg_timm.set_execution(model, execution)
    dg_timm.set_cascade(model, BUDGETS, threshold)
    unsure = CERTAINTIES["probability"](first) < threshold
    assert 0 < unsure.sum() < len(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.where(unsure[:, None], second, first))
        for image, right in zip(images, torch.where(unsure[:, None], second, first), strict=True):
            torch.testing.assert_close(model(image[None])[0], right)  # none or all of a batch
        assert model(images[:0]).shape == (0, 10)
    dg_timm.set_cascade(model, None)
    with torch.no_grad():
        torch.testing.assert_close(model(images), second)


@pytest.fixture
def apart(monkeypatch):
    """Passes that share nothing."""
    for module in (cascade, counting):
        monkeypatch.setattr(module, "may_reuse", lambda model: False)


@pytest.mark.usefixtures("apart")
def test_its_cost_is_that_of_both_passes():
    model, images, first, _, threshold = network()
    unsure = CERTAINTIES["probability"](first) < threshold
    costs = []
    for budget in BUDGETS:
        with requesting(sets_budget=True, budget=budget):
            costs.append(dg_timm.cost(model, images))
    dg_timm.set_cascade(model, BUDGETS, threshold)
    torch.testing.assert_close(dg_timm.cost(model, images), costs[0] + costs[1] * unsure)


@pytest.mark.usefixtures("apart")
def test_three_passes_and_every_gate_open():
    model, images, *_ = network()
    dg_timm.set_cascade(model, (0.0, 1.0, None), threshold=1.0)  # nobody is ever sure
    with torch.no_grad():
        torch.testing.assert_close(model(images), at(model, images, None))
    passes = []
    for budget in (0.0, 1.0, None):
        with requesting(sets_budget=True, budget=budget):
            passes.append(dg_timm.cost(model, images))
    torch.testing.assert_close(dg_timm.cost(model, images), sum(passes))


def test_who_looks_on_gets_the_same_answers_and_the_wiring_of_the_first_pass():
    model, images, first, second, threshold = network()
    with requesting(sets_budget=True, budget=BUDGETS[0]):
        wiring = dg_timm.adjacency(model, images)
    dg_timm.set_cascade(model, BUDGETS, threshold)
    unsure = CERTAINTIES["probability"](first) < threshold
    with torch.no_grad(), recording(model) as recorder:
        for _ in range(2):  # the passes of the last call count
            torch.testing.assert_close(model(images), torch.where(unsure[:, None], second, first))
    assert [places.tolist() for places, _ in recorder.later] == [unsure.nonzero().flatten().tolist()]
    for name, alpha in dg_timm.adjacency(model, images).items():
        assert torch.equal(alpha, wiring[name])
        assert torch.equal(recorder.recorded[name], alpha)


def test_training_runs_one_pass():
    model, images, *_, threshold = network()
    dg_timm.set_cascade(model, BUDGETS, threshold)
    model.train()
    model(images).sum().backward()


def test_it_can_not_be_exported():
    model, images, *_ = network()
    dg_timm.set_cascade(model, BUDGETS)
    with pytest.raises(Exception, match="set_cascade\\(model, None\\) first"):
        torch.export.export(model, (images,), strict=False)
    with pytest.raises(dg_timm.UserError, match=r"a cascade can't be scripted; .*set_cascade\(model, None\) first"):
        torch.jit.script(model)


def test_it_is_saved_copied_and_ended_by_a_budget(tmp_path):
    model, images, *_, threshold = network()
    model, images = model.float(), images.float()
    dg_timm.set_cascade(model, BUDGETS, threshold, certainty="margin")
    with torch.no_grad():
        wanted = model(images)
        dg_timm.save_pretrained(model, tmp_path / "net")
        loaded = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
        assert cascade_of(loaded) == cascade_of(model)
        for other in (loaded, copy.deepcopy(model)):
            torch.testing.assert_close(other(images), wanted)
        copied = copy.deepcopy(model)
        dg_timm.set_budget(copied, None)
        assert cascade_of(copied) is None
        torch.testing.assert_close(copied(images), at(model, images, None))


@pytest.mark.parametrize(
    ("budgets", "options", "match"),
    [
        ((0.5,), {}, "at least two budgets"),
        ("01", {}, "at least two budgets"),
        ((0.5, 0.5), {}, "must ascend"),
        ((1.0, 0.5), {}, "must ascend"),
        ((0.5, 1.5), {}, "lie between 0 and 1, got 1.5"),
        ((None, 0.5), {}, "budgets must be numbers"),
        (BUDGETS, dict(threshold="high"), "threshold must be a number, got 'high'"),
        (BUDGETS, dict(threshold=float("nan")), "threshold nan is never reached"),
        (BUDGETS, dict(threshold=1.5), "by probability is at most 1, so threshold 1.5 is never reached; give e.g. 0.5"),
        (BUDGETS, dict(certainty="entropy"), "by entropy is at most 0, so threshold 0.9 is never reached"),
        (BUDGETS, dict(certainty="luck"), "certainty must be one of probability, margin, entropy"),
        (BUDGETS, dict(certainty=["margin"]), "certainty must be one of probability, margin, entropy"),
    ],
)
def test_what_is_no_cascade(budgets, options, match):
    model, *_ = gated_network()
    with pytest.raises(dg_timm.UserError, match=match):
        dg_timm.set_cascade(model, budgets, **options)
    assert cascade_of(model) is None
    assert {gate.budget for gate in gates(model).values()} == {1.0}
    with pytest.raises(dg_timm.UserError, match="has none"):
        dg_timm.set_cascade(timm.create_model("dg_resnet18"), BUDGETS)
    with pytest.raises(dg_timm.UserError, match="classifier of two classes or more"):
        dg_timm.set_cascade(timm.create_model("dg_resnet18", gates=True, num_classes=1), BUDGETS)


def test_ending_no_cascade_leaves_a_budget_that_was_set():
    model, *_ = network()
    for gate in gates(model).values():
        gate.budget = 0.5
    dg_timm.set_cascade(model, None)
    assert {gate.budget for gate in gates(model).values()} == {0.5}
    dg_timm.set_cascade(model, (np.float32(0.25), np.int64(1)), threshold=np.int64(1))
    dg_timm.set_cascade(model, None)
    assert {gate.budget for gate in gates(model).values()} == {1.0}
