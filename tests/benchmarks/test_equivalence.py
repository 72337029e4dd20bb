"""What gives something else than it must is not timed."""

import pytest
import torch

from dg_timm.benchmarks.aggregation import measure_aggregation
from dg_timm.benchmarks.equivalence import NotEquivalent
from dg_timm.benchmarks.setting import Setting
from dg_timm.benchmarks.times import measure_times
from dg_timm.execution import autograd, operators

SETTING = Setting("inference", batch_size=3, image_size=64)
TRAINING = Setting("training", batch_size=3, image_size=64)


def spoil(monkeypatch, wrong):
    """Let ``wrong(right, features, weights)`` add up, but for the reference formulas."""
    right = operators.weighted_sum

    def weighted_sum(features, weights, plain=True):
        return wrong(right, features, weights) if plain else right(features, weights, plain)

    monkeypatch.setattr(operators, "weighted_sum", weighted_sum)


@torch.no_grad()
def test_a_conversion_that_predicts_something_else_is_not_timed(monkeypatch):
    assert measure_times(["dg_resnet18"], SETTING, 3)
    spoil(monkeypatch, lambda right, features, weights: 1.01 * right(features, weights))
    with pytest.raises(NotEquivalent, match="does not predict as its static network; it is not timed"):
        measure_times(["dg_resnet18"], SETTING, 3)


@torch.no_grad()
def test_a_network_that_is_wrong_only_where_all_edges_carry_is_not_timed(monkeypatch):
    spoil(monkeypatch, lambda right, features, weights: right(features[-1:], weights[:, -1:]))
    with pytest.raises(NotEquivalent, match="does not predict as the reference formulas"):
        measure_times(["dg_resnet18"], SETTING, 3)


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    assert measure_times(["dg_resnet18"], TRAINING, 3)
    right = autograd.product_gradients

    def wrong(*args, **options):
        dx, dw = right(*args, **options)
        return dx if dx is None else -dx, dw

    monkeypatch.setattr(autograd, "product_gradients", wrong)
    with pytest.raises(NotEquivalent, match="the gradient of dg_resnet18 is not that of the reference"):
        measure_times(["dg_resnet18"], TRAINING, 3)


def test_a_gradient_that_is_not_a_number_is_not_timed(monkeypatch):
    right = autograd.product_gradients

    def wrong(*args, **options):
        dx, dw = right(*args, **options)
        return dx if dx is None else dx * float("nan"), dw

    monkeypatch.setattr(autograd, "product_gradients", wrong)
    with pytest.raises(NotEquivalent, match="the gradient of dg_resnet18"):
        measure_times(["dg_resnet18"], TRAINING, 3)


def test_half_precision_is_compared_as_it_is_timed(monkeypatch):
    setting = Setting("inference", batch_size=2, image_size=64, dtype="bfloat16")
    with torch.no_grad():
        assert measure_times(["dg_resnet18"], setting, 3)
        right = operators.weighted_sum

        def weighted_sum(features, weights, plain=True):
            z = right(features, weights, plain)
            return 2 * z if plain and features[0].dtype == torch.bfloat16 else z

        monkeypatch.setattr(operators, "weighted_sum", weighted_sum)
        with pytest.raises(NotEquivalent, match="as it would be timed, does not predict"):
            measure_times(["dg_resnet18"], setting, 3)


def test_a_way_to_aggregate_that_gives_another_sum_is_not_timed(monkeypatch):
    right = operators.weighted_sum
    monkeypatch.setattr(operators, "weighted_sum", lambda *args: 2 * right(*args))
    with pytest.raises(NotEquivalent, match="kernels does not give the weighted sum"):
        measure_aggregation(["dg_resnet18"], [SETTING], 3)
