"""Networks that timm lacks and dg_timm registers: the CIFAR ResNets, and RandWire of Table 4."""

import pytest
import timm
import torch

import dg_timm
from dg_timm._errors import BadValue
from dg_timm.graph.topology import GENERATORS
from dg_timm.models.cifar_resnet import BLOCKS


@pytest.mark.parametrize("name", BLOCKS)
def test_cifar_resnets_have_the_layers_of_the_paper(name):
    """He et al., 2016, 4.2: 6n + 2 layers, 16, 32 and 64 channels at 32, 16 and 8 px; 20 layers, 0.27 M parameters."""
    model = timm.create_model(name)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == int(name.removeprefix("cifar_resnet")) == 6 * BLOCKS[name] + 2
    levels = model.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)
    assert [tuple(level.shape[1:]) for level in levels] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    if name == "cifar_resnet20":
        assert dg_timm.complexity(model).params == pytest.approx(0.27e6, rel=0.02)


def test_levels_and_pruning_agree():
    model = timm.create_model("cifar_resnet14").eval()
    x = torch.randn(2, 3, 32, 32)
    wanted = timm.create_model("cifar_resnet14", features_only=True)
    wanted.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fc")})
    features = wanted.eval()(x)
    assert wanted.feature_info.reduction() == [1, 1, 2, 4]
    final, levels = model.forward_intermediates(x)
    assert all(torch.equal(a, b) for a, b in zip(features, levels, strict=True))
    assert torch.equal(model.forward_head(final), model(x))
    assert torch.equal(model.forward_intermediates(x, indices=[1], stop_early=True)[0], levels[1])
    with pytest.raises(BadValue, match="output_fmt must be NCHW, got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    for indices in (0, 5, [4], [-5], []):
        with pytest.raises(BadValue, match="there are the levels 0 to 3, got the indices"):
            model.forward_intermediates(x, indices=indices)
    for indices, wanted in ((2, [2, 3]), ([-1, 0], [0, 3]), (None, [0, 1, 2, 3])):
        got = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert all(torch.equal(a, levels[k]) for a, k in zip(got, wanted, strict=True))
    model.set_grad_checkpointing()
    assert torch.equal(model.forward_features(x), final)
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.layer2) == len(model.layer3) == 0
    assert model(x).shape == (2, 16, 32, 32)


PAPER = {"er": 602e6, "ba": 582e6, "ws": 572e6}


@pytest.mark.parametrize("topology", GENERATORS)
def test_randwire_has_the_multiply_adds_of_table_4(topology):
    counted = dg_timm.complexity(timm.create_model("randwire_small", topology=topology))
    assert counted.convolutions == pytest.approx(PAPER[topology], rel=0.035)
    assert counted.params == pytest.approx(5.6e6, rel=0.03)  # Table 5


def test_randwire_follows_its_topology_and_learns():
    model = timm.create_model("randwire_small", topology="ws", topology_seed=2, num_classes=3).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    stage = model.eval().stages[0]
    x = torch.randn(1, 78, 16, 16)
    features = {0: x}
    for node, sources in enumerate(stage.topology[1:-1], start=1):
        weights = torch.sigmoid(stage.edges[node - 1])
        features[node] = stage.nodes[node - 1](sum(w * features[s] for w, s in zip(weights, sources, strict=True)))
    wanted = sum(features[s] for s in stage.topology[-1]) / len(stage.topology[-1])
    assert torch.allclose(stage(x), wanted, atol=1e-5)
    with pytest.raises(BadValue, match="topology must be one of chain, er, ba, ws, got 'x'"):
        timm.create_model("randwire_small", topology="x")


def test_the_chain_of_its_nodes_becomes_dg_net():
    model = dg_timm.dynamize(timm.create_model("randwire_small", topology="chain"), identity=False).eval()
    assert dg_timm.complexity(model).convolutions == pytest.approx(611e6, rel=0.02)
    alphas = dg_timm.adjacency(model, torch.randn(1, 3, 64, 64))
    assert [alpha.shape for alpha in alphas.values()] == [(1, 33, 33)] * 3
