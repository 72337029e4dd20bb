"""Networks that start to learn which edges to close: thresholds raised, identities that can skip blocks."""

import pytest
import timm
import torch

import dg_timm
from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.budget.preparation import DORMANT_LOGIT, make_skippable, raise_thresholds
from dg_timm.graph.stage import graph_stages
from tests.helpers.networks import FAMILIES, static_and_dynamic

SIZE = (3, 64, 64)


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


def test_thresholds_are_raised_to_where_no_edge_of_a_fresh_network_is_closed():
    model = timm.create_model("dg_resnet50", num_classes=3).eval()
    model.layer1.router0.threshold.data.fill_(0.7)
    raise_thresholds(model)
    assert model.layer1.router0.threshold.item() == pytest.approx(0.7)  # was higher
    assert model.layer1.router1.threshold.item() == pytest.approx(0.5 / 4)
    assert model.layer3.router2.threshold.item() == pytest.approx(0.5 / 7)
    model.layer1.router0.threshold.data.fill_(0.1)
    assert dg_timm.cost(model, torch.randn(1, *SIZE)).item() > 1  # all open


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
