"""The loss with a price: the squared distance of the cost to its target, the ramp and the noise."""

import pytest
import timm
import torch

from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.graph.stage import routers
from dg_timm.training.data.images import Batch
from dg_timm.training.loop.objective import ClassificationObjective, CostTarget
from tests.helpers.networks import closing_network

SIZE = (3, 64, 64)


def test_the_objective_adds_the_squared_distance():
    model = timm.create_model("dg_resnet18", num_classes=3).train()
    n = 4
    batch = Batch(
        torch.randn(n, *SIZE), torch.tensor([0, 1, 2, 0]), torch.tensor([1.0, 1, 1, 0]), torch.zeros(n, 2), [], []
    )
    task = ClassificationObjective(3)
    priced = CostTarget(task, ExpectedCost(model, SIZE), target=0.4, weight=7.0, ramp=10)
    assert [priced.target_at(update) for update in (0, 5, 10, 99)] == pytest.approx([1.0, 0.7, 0.4, 0.4])
    model.eval()
    losses, plain = priced(model, batch, 5), task(model, batch, 5)
    assert set(losses.metrics) == {"top1", "cost"}
    distance = losses.metrics["cost"][:3].mean() - 0.7
    assert torch.allclose(losses.loss, plain.loss + 7.0 * distance**2, rtol=1e-5)
    above = priced(model, batch, 99)  # nothing is closed, and the target is 0.4
    above.loss.sum().backward()
    gradients = [router.scale.grad for router in routers(model).values()]
    assert any(float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_nothing_is_paid_below_the_target_and_the_noise_goes():
    model, images = closing_network()
    batch = Batch(images, torch.zeros(8, dtype=torch.long), torch.ones(8), torch.zeros(8, 2), [], [])
    task = ClassificationObjective(10)
    priced = CostTarget(task, ExpectedCost(model), target=1.0, noise=5.0, noise_until=10, seed=3)
    assert [priced.noise_at(update) for update in (0, 5, 10, 99)] == [5.0, 2.5, 0.0, 0.0]
    assert torch.equal(priced(model, batch, 10).loss, task(model, batch, 10).loss)
    noisy = priced(model, batch, 0)
    assert noisy.metrics["cost"].std() > 0.01  # images meet the network with and without a block
    assert torch.equal(
        priced(model, batch, 0).metrics["cost"], noisy.metrics["cost"]
    )  # drawn by seed, update and process
    assert not torch.equal(priced(model, batch, 0, 0, 1).metrics["cost"], noisy.metrics["cost"])
