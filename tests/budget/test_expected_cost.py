"""Costs that can be learned from: their value is the cost, their gradient closes and opens nodes."""

import pytest
import timm
import torch

import dg_timm
from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.graph.context import request
from dg_timm.graph.stage import graph_stages, routers
from tests.helpers.networks import FAMILIES, closing_network, randomize_graph

SIZE = (3, 64, 64)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("instance_aware", [True, False])
def test_its_value_is_the_cost(name, instance_aware):
    model = randomize_graph(timm.create_model(name, num_classes=3, instance_aware=instance_aware).eval(), spread=5.0)
    with torch.no_grad():
        for router in routers(model).values():
            router.scale.mul_(torch.rand_like(router.scale))
    dg_timm.set_threshold(model, 0.3)
    images = 3 * torch.randn(4, *SIZE)
    with ExpectedCost(model, SIZE).recording() as costs:
        model(images)
    assert torch.allclose(costs().double(), dg_timm.cost(model, images), rtol=1e-5)
    assert costs().min() < 1  # something is closed


def test_a_price_closes_nodes_and_thresholds_stay():
    """Descent on the cost alone reaches a target, by routers and scales."""
    torch.manual_seed(0)
    model = randomize_graph(timm.create_model("dg_regnetx_002", num_classes=3).eval())
    images = torch.randn(4, *SIZE)
    learning = [p for router in routers(model).values() for p in router.parameters()]
    optimizer = torch.optim.Adam(learning, lr=0.02)
    expected = ExpectedCost(model, SIZE)
    for _ in range(60):
        with expected.recording() as costs:
            model(images)
        loss = (costs().mean() - 0.5).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert dg_timm.cost(model, images).mean().item() == pytest.approx(0.5, abs=0.08)
    assert all(router.threshold.grad is None for router in routers(model).values())
    assert request().gates is None


@pytest.mark.parametrize("options", [{}, {"block_shortcut": False}, {"topology": "ws"}])
def test_gates_change_no_result(options):
    model, images = closing_network(**options)
    with torch.no_grad():
        wanted = model(images)
        with ExpectedCost(model).recording() as costs:
            assert torch.equal(model(images), wanted)
    assert costs().std() > 0
    assert torch.allclose(costs(), dg_timm.cost(model, images).float())


def test_a_gate_learns_what_its_node_is_worth():
    """Its gradient is that of a factor on all edges that leave the node, also where the node is removed."""
    for seed in range(100):
        model, images = closing_network(seed, block_shortcut=False)
        model.layer3.router3.threshold.data.zero_()  # what leaves the last block is never closed by itself
        with ExpectedCost(model).recording():
            out = model(images)
            gate = request().gates[model.layer3].gates[-1]  # none comes after it
            (found,) = torch.autograd.grad(out.square().sum(), gate)
        if 0 < gate.sum() < len(images):
            break
    removed = gate[:, 0] == 0

    factor = torch.ones(len(images), 1, dtype=torch.double, requires_grad=True)

    def multiply(module, args, row):  # as the gate does, of what the node would weigh if it ran
        return row * factor

    handle = model.layer3.router3.register_forward_hook(multiply)
    (wanted,) = torch.autograd.grad(model(images).square().sum(), factor)
    handle.remove()
    assert torch.allclose(found[~removed].double(), wanted[~removed])
    assert (wanted[removed] == 0).all()
    assert found[removed].abs().min() > 0


def test_norms_of_a_removed_block_see_features_not_zeros():
    for recording in (True, False):
        model = timm.create_model("dg_cifar_resnet20", block_shortcut=False).train()
        with torch.no_grad():
            for source in (model.layer1.router0, model.layer1.router1):  # block 2 is removed for all images
                source.scale[1 - source.node] = 0.05
                source.threshold.fill_(0.1)
        images = torch.randn(8, 3, 32, 32)
        if recording:
            with ExpectedCost(model).recording() as costs:
                model(images)
            assert costs().max() < 1
        else:
            model(images)
        moved = model.layer1[1].bn1.running_var.mean() - 0.9  # of its start, a tenth is the batch's
        assert (moved > 1e-5) == recording


def test_a_node_is_priced_at_every_edge_that_keeps_it_open():
    model = timm.create_model("dg_cifar_resnet26").train()  # every edge open, weights 1 / in-degree
    with ExpectedCost(model, (3, 32, 32)).recording() as costs:
        model(torch.randn(2, 3, 32, 32))
    costs().sum().backward()
    for stage in graph_stages(model).values():
        slopes = [float(stage.get_submodule(f"router{i}").scale.grad[3 - i]) for i in range(4)]  # edges into block 4
        assert min(slopes) > 0
        assert max(slopes) < 2 * min(slopes)
