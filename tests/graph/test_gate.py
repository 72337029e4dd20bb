"""Gates: an image whose gate is closed skips the block, and its node passes on what it reads."""

import copy

import pytest
import timm
import torch
from torch import nn

import dg_timm
from dg_timm.execution.dense import unused_parameters
from dg_timm.graph.context import requesting
from dg_timm.graph.gate import Gate, gates, pass_on, pool_inputs, splice
from dg_timm.graph.stage import graph_stages
from tests.helpers.networks import FAMILIES, gated_network, randomize, static_and_dynamic

SIZE = (3, 64, 64)


@pytest.mark.parametrize("name", [*FAMILIES, "dg_cifar_resnet20"])
def test_a_fresh_gate_is_open_and_changes_no_bit(name):
    static, dynamic = static_and_dynamic(name, num_classes=3)
    options = dict(gates=True, num_classes=3)
    overlay = dict(state_dict=static.state_dict(), num_classes=3)
    gated = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    x = torch.randn(4, *SIZE)
    for execution in ("dense", "sparse"):
        dg_timm.set_execution(gated, execution)
        with torch.no_grad():
            assert torch.equal(gated(x), static(x))
    dg_timm.set_execution(gated, "dense")
    assert torch.equal(gated(x), static(x))  # with gradients
    new = sum(stage.input_node == "projection" for stage in graph_stages(gated).values())
    blocks = sum(len(stage.block_names) for stage in graph_stages(gated).values())
    assert len(gates(gated)) == blocks - new
    added = sum(p.numel() for p in gated.parameters()) - sum(p.numel() for p in dynamic.parameters())
    assert added == sum(gate.fc.in_features + 2 for gate in gates(gated).values())  # weight, bias, shift


def test_a_skipped_block_is_as_if_it_were_not_there():
    static = randomize(timm.create_model("resnet50", num_classes=3))
    model = dg_timm.dynamize(copy.deepcopy(static), gates=True)
    x = torch.randn(3, *SIZE)
    with torch.no_grad():
        for node in (2, 5):
            getattr(model.layer3, f"gate{node}").fc.bias.fill_(-1.0)
            static.layer3[node - 1] = nn.Identity()
        assert torch.equal(model(x), static(x))
        dg_timm.set_execution(model, "sparse")
        assert torch.equal(model(x), static(x))
    cost = dg_timm.cost(model, x)
    left = dg_timm.complexity(static, SIZE).convolutions / dg_timm.complexity(model, SIZE).convolutions
    assert cost[0].item() == pytest.approx(left, abs=0.005)
    alpha = dg_timm.adjacency(model, x)["layer3"][0]
    assert alpha[1, 3] == 1.0  # past node 2
    assert alpha[4, 6] == 1.0
    assert not alpha[[2, 5]].any()
    assert not alpha[:, [2, 5]].any()
    skipped = dg_timm.skipped_nodes(model, x)["layer3"]
    assert skipped.sum(1).tolist() == [2, 2, 2]
    assert skipped[0].nonzero().flatten().tolist() == [2, 5]


def test_block_1_passes_on_the_projection():
    static = randomize(timm.create_model("resnet18", num_classes=3))
    model = dg_timm.dynamize(copy.deepcopy(static), gates=True)
    model.layer2.gate1.fc.bias.data.fill_(-1.0)
    static.layer2[0] = static.layer2[0].downsample
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        wanted = static(x)
        assert torch.equal(model(x), wanted)
        dg_timm.set_execution(model, "sparse")
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("name", ["dg_cifar_resnet20", "dg_mobilenetv2_050", "dg_regnety_002"])
@pytest.mark.parametrize("options", [{}, {"instance_aware": False}])
def test_every_image_skips_its_own_blocks_in_every_execution(name, options):
    model, x = gated_network(name, **options)
    skipped = torch.cat(list(dg_timm.skipped_nodes(model, x).values()), 1)
    assert 0.1 < skipped.double().mean() < 0.8
    assert len(skipped.unique(dim=0)) > 3
    with torch.no_grad():
        wanted = model(x)
        one_by_one = torch.cat([model(image[None]) for image in x])
        dg_timm.set_execution(model, "sparse")
        torch.testing.assert_close(model(x), wanted)
        torch.testing.assert_close(one_by_one, wanted)
    assert dg_timm.cost(model, x).std() > 0


def test_an_adjacency_says_what_runs():
    """Follow its edges alone: what a skipped node passes on is in them."""
    model, x = gated_network()
    inputs = []
    stage = model.layer2
    handle = stage.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    outputs = []
    other = stage.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        alpha = dg_timm.adjacency(model, x)["layer2"]
        handle.remove()
        other.remove()
        for k, matrix in enumerate(alpha):
            source = inputs[0][k : k + 1]
            features = [stage[0].project(source)]
            for node in range(1, len(stage) + 1):
                z = sum(matrix[i, node] * features[i] for i in range(node))
                block = stage[node - 1]
                out = block.residual(matrix[0, 1] * source, z) if node == 1 else block(z)
                features.append(out if matrix[:, node].any() else torch.zeros_like(z))
            got = sum(matrix[i, -1] * features[i] for i in range(len(features)))
            torch.testing.assert_close(got[0], outputs[0][k])


def test_a_gate_learns_what_its_block_is_worth():
    """Its gradient is that of a factor between the block's feature and what it read."""
    feature, z = (torch.randn(3, 4, 2, 2, dtype=torch.double, requires_grad=True) for _ in range(2))
    gate = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.double, requires_grad=True)
    direction = torch.randn(3, 4, 2, 2, dtype=torch.double)
    out = pass_on(feature, z, gate, gate.detach() > 0)
    assert torch.equal(out, torch.where(gate[..., None, None] > 0, feature, z))
    found = torch.autograd.grad((out * direction).sum(), gate)[0]
    assert torch.allclose(found[:, 0], (direction * (feature - z)).sum((1, 2, 3)))


def test_pooled_inputs_are_those_of_the_sum():
    maps = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    weights = torch.rand(2, 3)
    weights[0, 1] = 0
    pooled = [x.mean((2, 3)) for x in maps]
    pooled[1][0] = float("nan")  # behind a closed edge
    summed = sum(x.nan_to_num() * w[:, None, None, None] for x, w in zip(maps, weights.unbind(1), strict=True))
    torch.testing.assert_close(pool_inputs(pooled, weights), summed.mean((2, 3)))


def test_splicing_a_chain():
    alpha = torch.zeros(2, 4, 4)
    alpha[:, 0, 1], alpha[:, 1, 2], alpha[:, 2, 3], alpha[:, 0, 2] = 0.5, 3.0, 1.0, 0.25
    skipped = torch.tensor([[False, True, True, False], [False] * 4])
    found = splice(alpha, skipped)
    assert torch.equal(found[1], alpha[1])
    assert found[0, 0, 3] == 0.5 * 3.0 + 0.25
    assert found[0].count_nonzero() == 1


def test_budgets_shift_a_gate():
    gate = Gate(4)
    gate.shift.data.fill_(-10.0)
    pooled = torch.zeros(2, 4)
    assert gate(pooled).flatten().tolist() == [3.0, 3.0]
    gate.budget = 0.5
    assert gate(pooled).flatten().tolist() == [-2.0, -2.0]
    assert gate(pooled, torch.tensor([[1.0], [0.0]])).flatten().tolist() == [3.0, -7.0]
    gate.budget = None
    assert (gate(pooled) > 0).all()
    with requesting(sets_budget=True, budget=0.0):
        assert gate(pooled).flatten().tolist() == [-7.0, -7.0]


def test_weights_of_a_network_without_gates_load_with_open_ones():
    plain = timm.create_model("dg_cifar_resnet20")
    model = gated_network()[0].float()
    model.load_state_dict(plain.state_dict())
    assert not any(bool(gate.fc.weight.any() or (gate.fc.bias < 0).any()) for gate in gates(model).values())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    with pytest.raises(dg_timm.UserError, match=r"unexpected 'layer1\.gate1"):
        plain.load_state_dict(model.state_dict())


def test_options_are_checked_and_saved(tmp_path):
    with pytest.raises(dg_timm.UserError, match="gates must be True or False, got 1"):
        dg_timm.dynamize(timm.create_model("resnet18"), gates=1)
    model = gated_network()[0].float()
    dg_timm.save_pretrained(model, tmp_path / "net")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert len(gates(loaded)) == len(gates(model))


def test_a_gated_stage_compiles_as_one_graph():
    model, _ = gated_network()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model.layer2, backend="eager", fullgraph=True)
        x = torch.randn(4, 16, 8, 8, dtype=torch.double)
        torch.testing.assert_close(compiled(x), model.layer2(x))


def test_gates_that_learn_nothing_still_take_part():
    """DistributedDataParallel waits for every parameter that a pass should have used."""
    model, images = gated_network()
    for gate in gates(model).values():
        gate.budget = None
    found = torch.autograd.grad(model(images).sum(), list(model.layer1.parameters()), allow_unused=True)
    assert any(gradient is not None for gradient in found)
    unused = unused_parameters(model.layer1, model.layer1.edges, fixed_threshold=False)
    assert {id(p) for gate in gates(model.layer1).values() for p in gate.parameters()} <= {id(p) for p in unused}
