"""The choice of budgets and cascades by what they do over some images."""

import itertools

import numpy as np
import pytest
import timm
import torch

import dg_timm
from dg_timm.execution.cascade import CERTAINTIES, cascade_of
from dg_timm.graph.context import requesting
from dg_timm.graph.gate import gates
from tests.helpers.networks import gated_network

BUDGETS = (0.0, 0.5, 1.0)


@pytest.fixture
def network():
    """A network with gates, and images whose labels are what its whole budget says, but for one."""
    model, images = gated_network()
    labels = run_at(model, images, 1.0).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    return model, [(images[:3], labels[:3]), (images[3:], labels[3:])]


def run_at(model, images, budget):
    with torch.no_grad(), requesting(sets_budget=True, budget=budget):
        return model(images)


def measure(model, batches):
    """Top-1 (%) and mean cost of the model as it is set."""
    images, labels = map(torch.cat, zip(*batches, strict=True))
    with torch.no_grad():
        return 100 * (model(images).argmax(1) == labels).double().mean().item(), dg_timm.cost(model, images).mean()


@pytest.mark.parametrize("aim", [dict(target_cost=1.2), dict(target_cost=0.8), dict(max_drop=0.0), dict(max_drop=30.0)])
def test_what_was_chosen_is_set_and_does_what_it_says(network, aim):
    model, batches = network
    choice = dg_timm.choose_cascade(model, batches, BUDGETS, **aim)
    top1, cost = measure(model, batches)
    assert top1 == pytest.approx(choice.top1)
    assert cost == pytest.approx(choice.cost)
    assert (cascade_of(model) is None) == (choice.threshold is None)
    if "target_cost" in aim:
        assert cost <= aim["target_cost"]


def test_budgets_may_be_an_array_and_one_class_is_sure_of_itself(network):
    model, batches = network
    assert dg_timm.choose_cascade(model, batches, np.array(BUDGETS), max_drop=100.0).cost < 1
    model.reset_classifier(1)
    ones = [(images, torch.zeros_like(labels)) for images, labels in batches]
    choice = dg_timm.choose_cascade(model.double(), ones, BUDGETS, max_drop=0.0)
    assert (choice.budgets, choice.threshold) == ((0.0,), None)


def test_nothing_that_was_tried_by_hand_is_better(network):
    model, batches = network
    images, labels = map(torch.cat, zip(*batches, strict=True))
    by_hand = []
    for low, high in itertools.combinations(BUDGETS, 2):
        for name, certainty in CERTAINTIES.items():
            for threshold in certainty(run_at(model, images, low)).tolist()[::4]:
                dg_timm.set_cascade(model, (low, high), threshold, name)
                by_hand.append(measure(model, batches))
    dg_timm.set_cascade(model, None)
    whole = 100 * (run_at(model, images, 1.0).argmax(1) == labels).double().mean().item()
    for target in (0.8, 1.0, 1.3):
        choice = dg_timm.choose_cascade(model, batches, BUDGETS, target_cost=target)
        assert choice.top1 >= max(top1 for top1, cost in by_hand if cost <= target)
    choice = dg_timm.choose_cascade(model, batches, BUDGETS, max_drop=13.0)
    assert choice.top1 >= whole - 13
    assert choice.cost <= min(cost for top1, cost in by_hand if top1 >= whole - 13) + 1e-9


@pytest.mark.parametrize(
    ("budgets", "aim", "match"),
    [
        (BUDGETS, {}, "either target_cost or max_drop"),
        (BUDGETS, dict(target_cost=0.5, max_drop=1.0), "either target_cost or max_drop"),
        ([], dict(max_drop=1.0), "between 0 and 1"),
        ([1.5], dict(max_drop=1.0), "between 0 and 1"),
        (["a"], dict(max_drop=1.0), "between 0 and 1"),
        (BUDGETS, dict(max_drop=-5), "max_drop must be a number from 0 on, got -5"),
        (BUDGETS, dict(max_drop=float("nan")), "max_drop must be a number from 0 on, got nan"),
        (BUDGETS, dict(target_cost="0.5"), "target_cost must be a number from 0 on, got '0.5'"),
        (BUDGETS, dict(target_cost=0.01), r"no budget costs 0.01 or less; the lowest costs 0\.\d+"),
    ],
)
def test_what_can_not_be_chosen_leaves_the_model(network, budgets, aim, match):
    model, batches = network
    with pytest.raises(dg_timm.UserError, match=match):
        dg_timm.choose_cascade(model, batches, budgets, **aim)
    with pytest.raises(dg_timm.UserError, match="no images"):
        dg_timm.choose_cascade(model, [], BUDGETS, max_drop=1.0)
    with pytest.raises(dg_timm.UserError, match="images without labels"):
        dg_timm.choose_cascade(model, [(images, None) for images, _ in batches], BUDGETS, max_drop=1.0)
    with pytest.raises(dg_timm.UserError, match="no gates"):
        dg_timm.choose_cascade(timm.create_model("dg_resnet18"), batches, BUDGETS, max_drop=1.0)
    assert cascade_of(model) is None
    assert {gate.budget for gate in gates(model).values()} == {1.0}
