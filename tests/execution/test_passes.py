"""What the passes of a cascade share: the result is the same, and less runs."""

import pytest
import torch
from torch import nn

import dg_timm
from dg_timm.analysis import counting
from dg_timm.analysis.counting import count_costs
from dg_timm.execution import cascade
from dg_timm.execution.passes import can_join, leading, may_reuse
from dg_timm.graph.context import requesting
from dg_timm.graph.gate import gates
from dg_timm.models.cifar_resnet import CifarResNet
from tests.helpers.networks import gated_network

BUDGETS = (0.0, 0.7, 1.0)


def leading_network(name="dg_cifar_resnet20"):
    """A network of which every image runs all of the first stage, and some all of the second, at a budget of 0."""
    model, images = gated_network(name)
    first, second, *_ = dict.fromkeys(gate.rpartition(".")[0] for gate in gates(model))
    with torch.no_grad():
        for gate_name, gate in gates(model).items():
            if gate_name.startswith(f"{first}."):
                gate.fc.bias += 1e4
            elif gate_name.startswith(f"{second}."):
                gate.fc.bias += 3.0
    dg_timm.set_execution(model, "sparse")
    return model, images


def multiply_adds(model, images):
    """Multiply-adds of convolutions that run for a batch, counted as they run."""
    found = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: found.append(out.numel() * m.weight[0].numel()))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        logits = model(images)
    for hook in hooks:
        hook.remove()
    return sum(found), logits


@pytest.mark.parametrize("name", ["dg_cifar_resnet20", "dg_mobilenetv2_050", "dg_resnet18"])
@pytest.mark.parametrize("budgets", [(0.0, 1.0), BUDGETS, (0.0, None)])
def test_a_later_pass_runs_less_and_gives_the_same(monkeypatch, name, budgets):
    model, images = leading_network(name)
    dg_timm.set_cascade(model, budgets, threshold=1.0)  # nobody is ever sure
    assert may_reuse(model)
    less, logits = multiply_adds(model, images)
    cost = dg_timm.cost(model, images).sum().item()
    each = [multiply_adds(model, image[None]) for image in images]
    torch.testing.assert_close(torch.cat([one for _, one in each]), logits)
    assert sum(macs for macs, _ in each) == less  # of a batch, every image runs what it runs alone
    for module in (cascade, counting):
        monkeypatch.setattr(module, "may_reuse", lambda model: False)
    more, wanted = multiply_adds(model, images)
    torch.testing.assert_close(logits, wanted)
    assert less < 0.97 * more
    # cost counts routers, gates and edges, too: of them, passes share about as much as of convolutions
    total = count_costs(model, tuple(images.shape[1:])).static_total
    saved = dg_timm.cost(model, images).sum().item() - cost
    assert saved * total == pytest.approx(more - less, rel=0.08)


def test_images_join_where_they_stop_agreeing():
    """Of what each stage is given, written out: its blocks see only the images that skipped one so far."""
    model, images = leading_network()
    dg_timm.set_cascade(model, (0.0, 1.0), threshold=1.0)
    with requesting(sets_budget=True, budget=0.0):
        skipped = [of_stage.any(1) for of_stage in dg_timm.skipped_nodes(model, images).values()]
    differs = torch.stack(skipped, 1).cumsum(1) > 0
    assert not differs[:, 0].any()
    assert 0 < differs[:, 1].sum() < len(images)
    seen = []
    model.conv1.register_forward_pre_hook(lambda m, args: seen.append(("stem", len(args[0]))))
    for name in ("layer1", "layer2", "layer3"):
        block = model.get_submodule(name)[0]
        block.register_forward_pre_hook(lambda m, args, name=name: seen.append((name, len(args[0]))))
    with torch.no_grad():
        model(images)
    second = dict(seen[len(seen) // 2 if len(seen) % 2 == 0 else 4 :])
    assert second["stem"] == 0
    assert "layer1" not in second
    assert second["layer2"] == int(differs[:, 1].sum())
    assert second["layer3"] == int(differs[:, 2].sum())


def test_who_skips_nothing_runs_once():
    model, images = gated_network()
    with torch.no_grad():
        for gate in gates(model).values():
            gate.fc.bias += 1e4
    dg_timm.set_execution(model, "sparse")
    once, wanted = multiply_adds(model, images)
    dg_timm.set_cascade(model, BUDGETS, threshold=1.0)
    found, logits = multiply_adds(model, images)
    assert found == once
    assert torch.equal(logits, wanted)
    with requesting(sets_budget=True, budget=0.0):
        alone = dg_timm.cost(model, images)
    torch.testing.assert_close(dg_timm.cost(model, images), alone)


class WithSkip(CifarResNet):
    """Takes the stem's map past all stages: an image can't join between them."""

    def forward_features(self, x):
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))) + x.mean((2, 3), keepdim=True).repeat(1, 4, 1, 1)


def test_where_maps_lead_past_stages_nothing_is_shared():
    model, images = leading_network()
    assert can_join(model)
    model.__class__ = type("Skipping", (WithSkip, type(model)), {})
    dg_timm.set_cascade(model, (0.0, 1.0), threshold=1.0)
    assert not can_join(model)
    with torch.no_grad(), requesting(sets_budget=True, budget=1.0):
        wanted = model(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), wanted)


def test_a_gate_that_closes_as_the_budget_rises_shares_nothing():
    model, _ = leading_network()
    assert may_reuse(model)
    nn.init.constant_(next(iter(gates(model).values())).shift, 0.1)
    assert not may_reuse(model)


def test_an_error_in_a_pass_ends_what_it_kept():
    model, images = leading_network()
    dg_timm.set_cascade(model, (0.0, 1.0), threshold=1.0)
    with torch.no_grad():
        wanted = model(images)
        broken = model.layer3.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images)
        broken.remove()
        with requesting(sets_budget=True, budget=1.0):
            torch.testing.assert_close(model(images), wanted)
        torch.testing.assert_close(model(images), wanted)


def test_who_has_several_passes_is_counted_by_image_and_stage():
    """Of a network whose images share some stages, what a second pass costs is the whole less what was shared."""
    model, images = leading_network()
    costs = []
    for budget in (0.0, 1.0):
        with requesting(sets_budget=True, budget=budget):
            costs.append(dg_timm.cost(model, images))
    dg_timm.set_cascade(model, (0.0, 1.0), threshold=1.0)
    shared = costs[0] + costs[1] - dg_timm.cost(model, images)
    assert (shared > 0).all()
    assert (shared <= costs[1] + 1e-9).all()  # all of it, of an image that skipped nothing
    assert len(shared.unique()) > 1


def test_leading():
    rows = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    assert leading(rows).tolist() == [2, 0, 4]
