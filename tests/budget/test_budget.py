"""Costs that can be learned from: their value is the cost, their gradient closes and opens edges."""

import pytest
import timm
import torch

import dg_timm
from dg_timm.budget.calibration import calibrate, threshold_curve
from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.budget.norms import refit_norms
from dg_timm.budget.start import DORMANT_LOGIT, make_skippable, raise_thresholds
from dg_timm.graph.stage import graph_stages, routers
from dg_timm.training.data.loading import Batch
from dg_timm.training.loop.objective import Classification, CostTarget
from tests.helpers.networks import FAMILIES, randomize, randomize_graph, static_and_dynamic

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
    assert all(stage.gates is None for stage in graph_stages(model).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_skippable_network_is_still_the_static_one(name):
    static, dynamic = static_and_dynamic(name, num_classes=3)
    make_skippable(dynamic)
    x = torch.randn(2, *SIZE)
    assert torch.equal(dynamic(x), static.eval()(x))
    assert dg_timm.cost(dynamic, x).max() < 1.06


def test_one_router_skips_a_block():
    _, model = static_and_dynamic("dg_resnet50", num_classes=3)
    make_skippable(model)
    x = torch.randn(1, *SIZE)
    before = dg_timm.cost(model, x).item()
    stage = next(s for s in graph_stages(model).values() if len(s.block_names) > 3)
    with torch.no_grad():
        stage.router1.fc.bias[0] = DORMANT_LOGIT  # the edge to block 2 closes ...
        stage.router1.fc.bias[1] = 0.0  # ... and the one past it wakes up
    alpha = next(a for a in dg_timm.adjacency(model, x).values() if a.shape[1] == len(stage.block_names) + 2)
    assert not alpha[0, :, 2].any()
    assert alpha[0, 1, 3] == 1.0
    assert dg_timm.cost(model, x).item() < before - 0.02


def test_what_is_no_identity_is_refused_and_left_alone():
    model = timm.create_model("dg_resnet18", num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="only an identity conversion"):
        make_skippable(model)
    _, identity = static_and_dynamic("dg_resnet18", num_classes=3)
    for threshold in (0.0, 0.03, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"threshold must lie between 0\.036 and 1"):
            make_skippable(identity, threshold)
    with pytest.raises(ValueError, match="is a static network"):
        ExpectedCost(timm.create_model("resnet18"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_objective_adds_the_squared_distance():
    model = timm.create_model("dg_resnet18", num_classes=3).train()
    n = 4
    batch = Batch(
        torch.randn(n, *SIZE), torch.tensor([0, 1, 2, 0]), torch.tensor([1.0, 1, 1, 0]), torch.zeros(n, 2), [], []
    )
    task = Classification(3)
    priced = CostTarget(task, ExpectedCost(model, SIZE), target=0.4, weight=7.0, ramp=10)
    assert [priced.target_at(update) for update in (0, 5, 10, 99)] == pytest.approx([1.0, 0.7, 0.4, 0.4])
    model.eval()
    losses, plain = priced(model, batch, 5), task(model, batch, 5)
    assert set(losses.shown) == {"top1", "cost"}
    distance = losses.shown["cost"][:3].mean() - 0.7
    assert torch.allclose(losses.loss, plain.loss + 7.0 * distance**2, rtol=1e-5)
    above = priced(model, batch, 99)  # nothing is closed, and the target is 0.4
    above.loss.sum().backward()
    gradients = [router.scale.grad for router in routers(model).values()]
    assert any(float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_thresholds_are_raised_to_where_no_edge_of_a_fresh_network_is_closed():
    model = timm.create_model("dg_resnet50", num_classes=3).eval()
    model.layer1.router0.threshold.data.fill_(0.7)
    raise_thresholds(model)
    assert model.layer1.router0.threshold.item() == pytest.approx(0.7)  # was higher
    assert model.layer1.router1.threshold.item() == pytest.approx(0.5 / 4)
    assert model.layer3.router2.threshold.item() == pytest.approx(0.5 / 7)
    model.layer1.router0.threshold.data.fill_(0.1)
    assert dg_timm.cost(model, torch.randn(1, *SIZE)).item() > 1  # all open


def test_nothing_is_paid_below_the_target_and_the_noise_goes():
    model, images = closing()
    batch = Batch(images, torch.zeros(8, dtype=torch.long), torch.ones(8), torch.zeros(8, 2), [], [])
    task = Classification(10)
    priced = CostTarget(task, ExpectedCost(model), target=1.0, noise=5.0, quiet=10, seed=3)
    assert [priced.noise_at(update) for update in (0, 5, 10, 99)] == [5.0, 2.5, 0.0, 0.0]
    assert torch.equal(priced(model, batch, 10).loss, task(model, batch, 10).loss)
    noisy = priced(model, batch, 0)
    assert noisy.shown["cost"].std() > 0.01  # images meet the network with and without a block
    assert torch.equal(priced(model, batch, 0).shown["cost"], noisy.shown["cost"])  # drawn by seed, update and process
    assert not torch.equal(priced(model, batch, 0, 0, 1).shown["cost"], noisy.shown["cost"])


def closing(seed=1, **options):
    """A network of which random images remove some blocks, in double precision."""
    torch.manual_seed(seed)
    model = randomize_graph(timm.create_model("dg_cifar_resnet20", **options).double().eval(), spread=3.0)
    with torch.no_grad():
        for router in routers(model).values():
            router.fc.weight.normal_(std=8.0)
            router.fc.bias.uniform_(-3, 3)
            router.threshold.fill_(0.3)
    return model, torch.randn(8, 3, 32, 32, dtype=torch.double)


@pytest.mark.parametrize("options", [{}, {"block_shortcut": False}, {"topology": "ws"}])
def test_gates_change_no_result(options):
    model, images = closing(**options)
    with torch.no_grad():
        wanted = model(images)
        with ExpectedCost(model).recording() as costs:
            assert torch.equal(model(images), wanted)
    assert costs().std() > 0
    assert torch.allclose(costs(), dg_timm.cost(model, images).float())


def test_a_gate_learns_what_its_node_is_worth():
    """Its gradient is that of a factor on all edges that leave the node, also where the node is removed."""
    for seed in range(100):
        model, images = closing(seed, block_shortcut=False)
        model.layer3.router3.threshold.data.zero_()  # what leaves the last block is never closed by itself
        with ExpectedCost(model).recording():
            out = model(images)
            gate = model.layer3.gates.of_nodes[-1]  # none comes after it
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
    with pytest.raises(ValueError, match=r"no threshold up to 2 brings the mean cost to 0\.01: .* it is 0\."):
        calibrate(model, batches, 0.01)
    with pytest.raises(ValueError, match="target_cost must be above 0, got nan"):
        calibrate(model, batches, float("nan"))
    with pytest.raises(ValueError, match="no images"):
        threshold_curve(model, iter([]), [0.1])
    assert all(router.fixed_threshold is None for router in routers(model).values())


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_norms_are_refitted_for_the_thresholds_in_force(execution):
    """Over one batch in eval mode the refitted network gives what batch statistics give, and nothing else changes."""
    torch.manual_seed(0)
    model = randomize_graph(timm.create_model("dg_regnetx_002", num_classes=3).eval(), spread=3.0)
    dg_timm.set_threshold(model, 0.3)
    dg_timm.set_execution(model, execution)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = 3 * torch.randn(8, *SIZE)
    stem = model.stem.bn
    refit_norms(model, [images[:4], images[4:]])
    maps = model.stem.conv(images)
    assert torch.allclose(stem.running_mean, maps.mean((0, 2, 3)), atol=1e-5)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert not any(module.training for module in model.modules())
    assert all(norm.momentum == 0.1 for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d))
    assert {stage.execution for stage in graph_stages(model).values()} == {execution}
    after = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="no images"):
        refit_norms(model, [])
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())


def test_a_node_is_priced_at_every_edge_that_keeps_it_open():
    model = timm.create_model("dg_cifar_resnet26").train()  # every edge open, weights 1 / in-degree
    with ExpectedCost(model, (3, 32, 32)).recording() as costs:
        model(torch.randn(2, 3, 32, 32))
    costs().sum().backward()
    for stage in graph_stages(model).values():
        slopes = [float(stage.get_submodule(f"router{i}").scale.grad[3 - i]) for i in range(4)]  # edges into block 4
        assert min(slopes) > 0
        assert max(slopes) < 2 * min(slopes)


@pytest.mark.parametrize("bad", [[torch.zeros(2, 5, 32, 32)], [torch.full((2, 3, 32, 32), float("nan"))], []])
def test_refitting_that_fails_leaves_the_model_as_it_was(bad):
    model = randomize(timm.create_model("dg_cifar_resnet20"))
    before = {name: own.clone() for name, own in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)):
        refit_norms(model, bad)
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("path", [[0, 1, 3, 4], [0, 3, 4], [0, 1, 4]])
def test_one_open_edge_a_node_skips_blocks(path):
    """SkipNet as a graph: the blocks on the path run, the others do not, and nothing else changes."""
    static, model = static_and_dynamic("dg_cifar_resnet20")
    for name, stage in graph_stages(model).items():
        blocks = static.get_submodule(name)
        # block 1 of the later stages changes shape and always stands in the static chain; node 0 is its shortcut
        own = path if name == "layer1" else [0, 1, *[n for n in path if n > 1]]
        for node, router in ((n, stage.get_submodule(f"router{n}")) for n in range(4)):
            router.scale.data.zero_()
            if node in own[:-1]:
                router.scale.data[own[own.index(node) + 1] - node - 1] = 2.0
            router.threshold.data.fill_(0.5)
        setattr(static, name, torch.nn.Sequential(*[blocks[n - 1] for n in own[1:-1]]))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), static(x))
        dg_timm.set_execution(model, "sparse")
        torch.testing.assert_close(model(x), static(x), rtol=1e-4, atol=1e-4)
    assert (dg_timm.cost(model, x) < 1).all()
