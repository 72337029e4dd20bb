"""The plain network that gates found: blocks left out for every image, and no gate."""

import copy

import pytest
import timm
import torch
from torch import nn

import dg_timm
from dg_timm.budget.fixed import leave_out
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import graph_stages
from tests.helpers.networks import gated_network, randomize


def test_it_is_the_network_with_the_gates_of_the_majority():
    model, images = gated_network()
    plain = dg_timm.to_fixed(model, [images[:4], images[4:]], share=0.7)
    shares = {name: 1 - s.double().mean(0) for name, s in dg_timm.skipped_nodes(model, images).items()}
    left_out = {name: stage.skipped_blocks() for name, stage in graph_stages(plain).items()}
    assert left_out == {name: (share < 0.7).nonzero().flatten().tolist() for name, share in shares.items()}
    assert any(left_out.values())
    assert not gates(plain)
    for name, share in shares.items():  # the same decisions for every image
        for node, own in enumerate(share[1:-1].tolist(), start=1):
            gate = model.get_submodule(f"{name}.gate{node}")
            nn.init.zeros_(gate.fc.weight)
            nn.init.constant_(gate.fc.bias, 1.0 if own >= 0.7 else -1.0)
    with torch.no_grad():
        wanted = model(images)
        torch.testing.assert_close(plain(images), wanted)
        dg_timm.set_execution(plain, "sparse")
        torch.testing.assert_close(plain(images), wanted)
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in model.parameters())


def test_it_is_saved_trained_scripted_and_exported_as_any_other(tmp_path):
    model, images = gated_network("dg_resnet18")
    dg_timm.set_threshold(model, 0.0)  # a node that nothing enters is removed, not skipped
    for gate in (model.layer2.gate1, model.layer3.gate2):  # one of them makes node 0's feature
        nn.init.zeros_(gate.fc.weight)
        nn.init.constant_(gate.fc.bias, -1.0)
    plain = dg_timm.to_fixed(model.float(), images.float(), share=0.01)
    dg_timm.set_threshold(plain, None)
    assert plain.layer2.skipped_blocks() == [1]
    x = images.float()
    with torch.no_grad():
        wanted = plain(x)
        dg_timm.save_pretrained(plain, tmp_path / "plain")
        loaded = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
        assert torch.equal(loaded(x), wanted)
        torch.testing.assert_close(torch.export.export(plain, (x,)).module()(x), wanted, rtol=1e-4, atol=1e-4)
    plain.train()
    plain.set_grad_checkpointing(True)
    plain(x).square().mean().backward()
    assert all(p.grad is not None for name, p in plain.named_parameters() if "threshold" not in name)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_is_scripted():
    model, images = gated_network()
    plain = dg_timm.to_fixed(model, images)
    with torch.no_grad():
        wanted = plain(images)
        torch.testing.assert_close(torch.jit.script(plain)(images), wanted)


def test_a_static_network_without_a_block():
    static = randomize(timm.create_model("resnet50", num_classes=3))
    model = dg_timm.dynamize(copy.deepcopy(static))
    leave_out(model, {"layer3": [3]})
    static.layer3[2] = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), static(x))


def test_of_a_cascade_nothing_is_left():
    model, images = gated_network()
    dg_timm.set_cascade(model, (0.0, 1.0), threshold=0.5)
    plain = dg_timm.to_fixed(model, images)
    assert not plain._forward_hooks
    assert model._forward_hooks  # which stays as it was


def test_what_can_not_be_fixed():
    model, images = gated_network()
    with pytest.raises(dg_timm.UserError, match="share must lie between 0 and 1, got 2"):
        dg_timm.to_fixed(model, images, share=2)
    with pytest.raises(dg_timm.UserError, match="no images"):
        dg_timm.to_fixed(model, [])
    with pytest.raises(dg_timm.UserError, match="no gates"):
        dg_timm.to_fixed(timm.create_model("dg_resnet18"), images)
    with pytest.raises(dg_timm.UserError, match="there is no stage 'layer9'"):
        leave_out(model, {"layer9": [1]})
    with pytest.raises(dg_timm.UserError, match="are 1 to 3, got \\[4\\]"):
        leave_out(model, {"layer1": [4]})
    assert gates(model)
