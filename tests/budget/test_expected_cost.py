"""Costs that can be learned from: their value is what runs, their gradient opens and closes gates."""

import pytest
import timm
import torch

import dg_timm
from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.graph.context import request
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import graph_stages
from tests.helpers.networks import FAMILIES, gated_network

SIZE = (3, 32, 32)


def shares_of_skipped(model, images):
    """Of all blocks, also in stages whose only block has no gate."""
    skipped = torch.cat(list(dg_timm.skipped_nodes(model, images).values()), 1).double().sum(1)
    return skipped / sum(len(stage.block_names) for stage in graph_stages(model).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_its_value_is_the_cost_with_every_edge_open(name):
    model, images = gated_network(name)
    dg_timm.set_threshold(model, 0.0)
    with ExpectedCost(model, SIZE).recording(len(images)) as costs:
        model(images)
    found, skipped = costs()
    cost = dg_timm.cost(model, images)
    assert (found >= cost - 1e-5).all()
    assert torch.allclose(found, cost, atol=0.05)  # edges past a skipped node are counted once more
    assert found.min() < 0.95
    assert torch.allclose(skipped.double(), shares_of_skipped(model, images))


def test_a_price_closes_gates_and_opens_them():
    """Descent on the cost alone reaches a target from either side; routers and thresholds stay."""
    torch.manual_seed(0)
    model = timm.create_model("dg_regnetx_002", num_classes=3, gates=True).eval()
    images = torch.randn(8, *SIZE)
    before = {name: p.clone() for name, p in model.named_parameters() if "router" in name}
    optimizer = torch.optim.Adam([p for gate in gates(model).values() for p in gate.parameters()], lr=0.2)
    expected = ExpectedCost(model, SIZE)
    for target in (0.5, 0.8):
        for update in range(60):
            with expected.recording(8, noise=1.0, seed=update) as costs:
                model(images)
            (costs()[0].mean() - target).square().backward()
            optimizer.step()
            optimizer.zero_grad()
        with expected.recording(8) as costs:
            model(images)
        assert costs()[0].mean().item() == pytest.approx(target, abs=0.15), target
    assert request().gates is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "router" in name)


def test_noise_is_drawn_by_its_seed_for_each_image_and_gate():
    model = timm.create_model("dg_cifar_resnet20", gates=True).eval()
    images = torch.randn(1, *SIZE).expand(64, -1, -1, -1)
    expected = ExpectedCost(model)

    def drawn(**options):
        with torch.no_grad(), expected.recording(64, **options) as costs:
            model(images)
        return costs()[0]

    assert drawn().std() < 1e-6
    assert drawn(noise=2.0).std() > 0.01
    assert torch.equal(drawn(noise=2.0, seed=1), drawn(noise=2.0, seed=1))
    assert not torch.equal(drawn(noise=2.0, seed=1), drawn(noise=2.0, seed=2))


def test_every_image_can_aim_at_a_budget_of_its_own():
    model, images = gated_network()
    dg_timm.set_threshold(model, 0.0)
    with torch.no_grad(), ExpectedCost(model).recording(8, budgets=torch.tensor([0.0, 1.0] * 4)) as costs:
        mixed = model(images)
    for budget, rows in ((0.0, slice(0, None, 2)), (1.0, slice(1, None, 2))):
        for gate in gates(model).values():
            gate.budget = budget
        with torch.no_grad():
            torch.testing.assert_close(model(images)[rows], mixed[rows])
        assert torch.allclose(costs()[1][rows].double(), shares_of_skipped(model, images)[rows])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_the_task_reaches_gates(checkpointing):
    model, images = gated_network()
    model.set_grad_checkpointing(checkpointing)
    with ExpectedCost(model).recording(8, noise=1.0, budgets=torch.linspace(0, 1, 8)):
        out = model(images)
    out.square().sum().backward()
    assert all(gate.fc.weight.grad.any() and gate.shift.grad.any() for gate in list(gates(model).values())[1:])


def test_what_has_no_gates_is_refused():
    with pytest.raises(dg_timm.UserError, match="is a static network"):
        ExpectedCost(timm.create_model("resnet18"))
    with pytest.raises(dg_timm.UserError, match="this network has none: convert it with gates=True"):
        ExpectedCost(timm.create_model("dg_resnet18"))
    model, images = gated_network()
    dg_timm.set_execution(model, "sparse")
    with pytest.raises(dg_timm.UserError, match="learned in dense execution"), ExpectedCost(model).recording(8):
        model(images)


def test_its_minimum_is_the_cost_with_every_gate_closed():
    model, images = gated_network()
    dg_timm.set_threshold(model, 0.0)
    for gate in gates(model).values():
        torch.nn.init.zeros_(gate.fc.weight)
        torch.nn.init.constant_(gate.fc.bias, -1.0)
    assert dg_timm.cost(model, images).max().item() == pytest.approx(ExpectedCost(model).minimum, abs=1e-6)


def test_a_pass_that_is_computed_again_counts_once():
    """Checkpointed blocks run a second time in the backward pass, and a loop may run the network twice."""
    model, images = gated_network()
    model.train()
    model.set_grad_checkpointing(True)
    expected = ExpectedCost(model)
    with expected.recording(len(images)) as costs:
        model(images)
        once, _ = costs()
        model(images).sum().backward()
        again, _ = costs()
    torch.testing.assert_close(again, once)
