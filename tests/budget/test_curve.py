"""Budgets: what each costs, and the setting between two measured points."""

import pytest
import timm
import torch

import dg_timm
from dg_timm._hardware import describe_hardware
from dg_timm.budget.curve import BudgetPoint, keep_curve
from dg_timm.graph.gate import gates
from tests.helpers.networks import gated_network


def measured():
    model, images = gated_network()
    labels = torch.zeros(len(images), dtype=torch.long)
    points = dg_timm.measure_budgets(model, [(images[:4], labels[:4]), (images[4:], labels[4:])], (0.0, 0.5, 1.0))
    return model, images, points


def test_a_curve_says_what_each_budget_costs():
    model, images, points = measured()
    assert [point.cost for point in points] == sorted(point.cost for point in points)
    assert points[0].cost < points[-1].cost
    for point in points:
        for gate in gates(model).values():
            gate.budget = point.budget
        costs = dg_timm.cost(model, images)
        assert costs.mean().item() == pytest.approx(point.cost)
        assert costs.std(unbiased=False).item() == pytest.approx(point.spread)
        assert 100 * (model(images).argmax(1) == 0).double().mean().item() == pytest.approx(point.top1)


def test_a_budget_is_set_by_its_cost_and_none_opens_everything():
    model, images, points = measured()
    keep_curve(model, points)
    dg_timm.set_budget(model, points[1].cost)
    assert {gate.budget for gate in gates(model).values()} == {0.5}
    dg_timm.set_budget(model, (points[0].cost + points[1].cost) / 2)
    assert {gate.budget for gate in gates(model).values()} == {gates(model)["layer1.gate1"].budget}
    assert gates(model)["layer1.gate1"].budget == pytest.approx(0.25)
    dg_timm.set_budget(model, None)
    assert not any(of_stage.any() for of_stage in dg_timm.skipped_nodes(model, images).values())
    with torch.no_grad():
        wanted = model(images)
        dg_timm.set_execution(model, "sparse")
        torch.testing.assert_close(model(images), wanted)


def test_milliseconds_are_those_of_this_machine():
    model, _, points = measured()
    here = [
        BudgetPoint(p.budget, p.cost, p.spread, p.top1, ms, describe_hardware())
        for p, ms in zip(points, (1.0, 2.0, 4.0), strict=True)
    ]
    found = dg_timm.measure_budgets(model, [(torch.randn(2, 3, 32, 32).double(), None)], (0.0, 1.0), timed_images=2)
    assert all(point.milliseconds > 0 and point.where == describe_hardware() for point in found)
    keep_curve(model, here)
    dg_timm.set_budget(model, milliseconds=3)
    assert {gate.budget for gate in gates(model).values()} == {0.75}
    keep_curve(model, [BudgetPoint(p.budget, p.cost, p.spread, p.top1, p.milliseconds, "another") for p in here])
    with pytest.raises(dg_timm.UserError, match="no time of this network was measured on this machine"):
        dg_timm.set_budget(model, milliseconds=3)


def test_what_can_not_be_set_changes_nothing():
    model, _, points = measured()
    with pytest.raises(dg_timm.UserError, match="no measured curve"):
        dg_timm.set_budget(model, 0.6)
    keep_curve(model, points)
    for cost, match in [
        (0.01, "outside what this network was measured for"),
        (1.5, "outside"),
        (float("nan"), "outside"),
    ]:
        with pytest.raises(dg_timm.UserError, match=match):
            dg_timm.set_budget(model, cost)
    with pytest.raises(dg_timm.UserError, match="cost must be a number or None"):
        dg_timm.set_budget(model, "0.6")
    with pytest.raises(dg_timm.UserError, match="not both"):
        dg_timm.set_budget(model, 0.6, milliseconds=1)
    assert {gate.budget for gate in gates(model).values()} == {1.0}
    with pytest.raises(dg_timm.UserError, match="no gates"):
        dg_timm.set_budget(timm.create_model("dg_resnet18"), 0.5)
    with pytest.raises(dg_timm.UserError, match="no images"):
        dg_timm.measure_budgets(model, [], [1.0])
    for budgets in ([], [1.5], [float("nan")]):
        with pytest.raises(dg_timm.UserError, match="must be numbers between 0 and 1"):
            dg_timm.measure_budgets(model, [], budgets)


def test_a_saved_network_keeps_its_curve(tmp_path):
    model, images, points = measured()
    model = model.float()
    keep_curve(model, points)
    dg_timm.save_pretrained(model, tmp_path / "net")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    assert dg_timm.budget_curve(loaded) == dg_timm.budget_curve(model) == points
    dg_timm.set_budget(loaded, points[1].cost)
    backbone = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True, features_only=True)
    dg_timm.set_budget(backbone, points[1].cost)
    dg_timm.set_budget(model, points[1].cost)
    assert torch.equal(loaded(images.float()), model(images.float()))
