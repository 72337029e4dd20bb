"""Thresholds for a compute budget: one network serves many."""

import pytest
import timm
import torch

import dg_timm
from dg_timm.budget.calibration import calibrate, threshold_curve
from dg_timm.graph.stage import routers
from tests.helpers.networks import randomize_graph

SIZE = (3, 64, 64)


def test_one_network_serves_many_budgets():
    torch.manual_seed(0)
    model = randomize_graph(timm.create_model("dg_regnetx_002", num_classes=3).eval(), spread=3.0)
    batches = [3 * torch.randn(3, *SIZE) for _ in range(2)]
    curve = threshold_curve(model, batches, [0.0, 0.2, 0.5, 2.0])
    assert [point.cost for point in curve] == sorted((point.cost for point in curve), reverse=True)
    assert curve[0].cost > 0.95
    assert curve[-1].cost < 0.5
    assert max(point.spread for point in curve) > 0  # images take different paths
    assert all(router.fixed_threshold is None for router in routers(model).values())
    for target in (0.9, 0.7):
        found = calibrate(model, batches, target, steps=8)
        costs = torch.cat([dg_timm.cost(model, images) for images in batches])
        assert costs.mean().item() == pytest.approx(found.cost)
        assert found.cost <= target
        below = threshold_curve(model, batches, [found.threshold - 2 / 2**8])[0]
        assert below.cost > target


def test_a_budget_that_can_not_be_kept_changes_nothing():
    model = timm.create_model("dg_resnet18", num_classes=3).eval()
    batches = [torch.randn(2, *SIZE)]
    with pytest.raises(ValueError, match=r"target cost 0\.01 is unreachable: the minimum, at threshold 2, is 0\.\d+"):
        calibrate(model, batches, 0.01)
    with pytest.raises(ValueError, match="target_cost must be above 0, got nan"):
        calibrate(model, batches, float("nan"))
    with pytest.raises(ValueError, match="no images"):
        threshold_curve(model, iter([]), [0.1])
    with pytest.raises(dg_timm.UserError, match="expected images of 3 channels, got 4"):
        calibrate(model, [torch.randn(2, 4, 64, 64)], 0.9)
    assert all(router.fixed_threshold is None for router in routers(model).values())
