"""The loss with a price: the squared distance of the cost to its target, ranges, the ramp and the noise."""

import pytest
import torch

from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.graph.context import request
from dg_timm.graph.gate import gates
from dg_timm.training.data.images import Batch
from dg_timm.training.loop.objective import ClassificationObjective, CostTarget
from tests.helpers.networks import gated_network


def batch_of(images, mask=None):
    n = len(images)
    mask = torch.ones(n) if mask is None else mask
    return Batch(images, torch.zeros(n, dtype=torch.long), mask, torch.zeros(n, 2), [], [])


def test_the_objective_adds_the_squared_distance():
    model, images = gated_network()
    batch = batch_of(images, torch.tensor([1.0] * 6 + [0.0] * 2))
    task, expected = ClassificationObjective(10), ExpectedCost(model)
    priced = CostTarget(task, expected, targets=(0.4, 0.4), weight=7.0, ramp=10)
    assert [priced.targets_at(update)[0] for update in (0, 5, 10, 99)] == pytest.approx([1.0, 0.7, 0.4, 0.4])
    losses, plain = priced(model, batch, 99), task(model, batch, 99)
    assert set(losses.metrics) == {"top1", "cost", "skipped", "spread"}
    cost = losses.metrics["cost"][:6]  # images that don't count have no price
    distance = cost.mean() - 0.4
    torch.testing.assert_close(losses.loss, plain.loss + 7.0 * distance**2, check_dtype=False)
    assert torch.allclose(losses.metrics["spread"][:6], (cost - cost.mean()).abs())
    losses.loss.sum().backward()
    assert all(gate.fc.bias.grad.any() for gate in gates(model).values())


def test_nothing_is_paid_below_the_target_and_the_noise_goes():
    model, images = gated_network()
    batch, task = batch_of(images), ClassificationObjective(10)
    priced = CostTarget(task, ExpectedCost(model), targets=(1.1, 1.1), noise=5.0, noise_until=10, seed=3)
    assert [priced.noise_at(update) for update in (0, 5, 10, 99)] == [5.0, 2.5, 0.0, 0.0]
    assert torch.equal(priced(model, batch, 10).loss, task(model, batch, 10).loss)
    noisy = priced(model, batch, 0)
    same = priced(model, batch, 0)  # drawn by seed, update and process
    assert torch.equal(same.metrics["cost"], noisy.metrics["cost"])
    assert not torch.equal(priced(model, batch, 0, 0, 1).metrics["cost"], noisy.metrics["cost"])


def test_of_a_range_thirds_aim_at_its_ends_and_one_between():
    model, images = gated_network()
    images = images.repeat(12, 1, 1, 1)
    for gate in gates(model).values():
        gate.shift.data.fill_(-100.0)
    seen = []

    def task(model, batch, *entropy):
        seen.append(request().gates.budgets[:, 0])
        return ClassificationObjective(10)(model, batch, *entropy)

    priced = CostTarget(task, ExpectedCost(model), targets=(0.5, 0.9), weight=20.0, seed=1)
    losses = priced(model, batch_of(images), 5)
    (budgets,) = seen
    assert (budgets == 0.5).sum() == (budgets == 0.9).sum() == len(images) / 3
    between = budgets[(budgets != 0.5) & (budgets != 0.9)]
    assert between.min() > 0.5
    assert between.max() < 0.9
    cost = losses.metrics["cost"]
    assert cost[budgets == 0.5].mean() < cost[budgets == 0.9].mean()
    distances = {target: cost[budgets == target].mean() - target for target in (0.5, 0.9)}
    assert min(distances.values()) < 0  # too cheap has a price, too
    priced.weight = 0.0
    free = priced(model, batch_of(images), 5)
    for target, distance in distances.items():
        added = (losses.loss - free.loss)[budgets == target]
        assert torch.allclose(added, torch.full_like(added, 20.0) * distance.double() ** 2, rtol=1e-4)
