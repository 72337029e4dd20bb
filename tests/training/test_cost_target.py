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


def test_of_a_range_every_image_passes_at_its_ends_and_between():
    model, images = gated_network()
    images, size = images.repeat(2, 1, 1, 1), 2 * len(images)
    for gate in gates(model).values():
        gate.shift.data.fill_(-100.0)
    seen = []

    def task(model, batch, *entropy, copies):
        seen.append(request().gates.budgets[:, 0].view(copies, -1))
        return ClassificationObjective(10)(model, batch, *entropy, copies=copies)

    expected = ExpectedCost(model)
    priced = CostTarget(task, expected, targets=(0.5, 0.9), weight=20.0, seed=1)
    losses = priced(model, batch_of(images), 5)
    ((high, low, between),) = seen
    assert (high == 0.9).all()
    assert (low == 0.5).all()
    assert between.min() > 0.5
    assert between.max() < 0.9
    assert len(between.unique()) > size // 2
    with expected.recording(3 * size, budgets=torch.cat([high, low, between])) as costs:
        model(torch.cat([images] * 3))
    cost = costs()[0].view(3, size)
    assert cost[1].mean() < cost[0].mean()
    torch.testing.assert_close(losses.metrics["cost"], cost.mean(0))
    above = cost.mean(1) - torch.stack([high, low, between]).mean(1)
    assert above.min() < 0  # too cheap has a price, too
    priced.weight = 0.0
    added = losses.loss - priced(model, batch_of(images), 5).loss
    torch.testing.assert_close(added, (20.0 * above.square().mean()).expand(size), check_dtype=False, rtol=1e-4, atol=0)


def test_copies_learn_from_the_first_which_learns_from_the_teacher():
    images = torch.rand(4, 5)
    rows = {len(images): images, 3 * len(images): torch.cat([images, images * 2, images * 3])}
    model = lambda x: rows[len(x)]  # noqa: E731
    batch = batch_of(images)
    alone = ClassificationObjective(5, distill_weight=0.25)
    plain = [ClassificationObjective(5)(lambda x, by=by: x * by, batch).loss for by in (1, 2, 3)]
    losses = alone(model, batch, copies=3)
    shares = images.softmax(1)
    learned = [(shares * (images.log_softmax(1) - (images * by).log_softmax(1))).sum(1) for by in (2, 3)]
    rest = [0.75 * loss + 0.25 * other for loss, other in zip(plain[1:], learned, strict=True)]
    torch.testing.assert_close(losses.loss, (plain[0] + rest[0] + rest[1]) / 3)
    assert torch.equal(losses.metrics["top1"], alone(model, batch).metrics["top1"])
    rows[12] = rows[12].requires_grad_()
    alone(model, batch, copies=3).loss.sum().backward()
    first = rows[12].grad[:4]
    own = images.clone().requires_grad_()
    ClassificationObjective(5)(lambda _: own, batch).loss.sum().backward()
    torch.testing.assert_close(first, own.grad / 3)  # the first doesn't move towards the others
