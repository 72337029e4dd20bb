"""The cost of an image against a count of what runs, layer by layer."""

import pytest
import timm
import torch
from torch import nn

import dg_timm
from dg_timm.graph.router import Router
from dg_timm.graph.stage import graph_stages
from tests.helpers.networks import FAMILIES, randomize_graph

SIZE = (3, 64, 64)


def layers(model, prefix=""):
    """Multiply-adds of every convolution and linear layer that runs, by name."""
    counts, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, Router)):

            def count(module, args, out, name=name):
                weight = module.fc.weight if isinstance(module, Router) else module.weight  # its layer is no call
                counts[name] = out[0].numel() * weight[0].numel()

            handles.append(module.register_forward_hook(count))
    model.eval()(torch.randn(1, *SIZE))
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_with_every_edge_open_it_is_the_complexity(name):
    static, dynamic = timm.create_model(name.removeprefix("dg_")), timm.create_model(name)
    images = torch.randn(3, *SIZE)
    aggregation = dg_timm.analysis.counting(dynamic, SIZE).aggregation
    expected = (sum(layers(dynamic).values()) + aggregation) / sum(layers(static).values())
    assert dg_timm.cost(dynamic, images).tolist() == pytest.approx([expected] * 3, rel=1e-12)
    assert 1 < expected < 1.2


@pytest.mark.parametrize("name", ["dg_resnet50", "dg_mobilenetv2_050", "dg_regnety_002"])
def test_a_removed_node_saves_its_block_and_its_edges(name):
    model = timm.create_model(name)
    counts = layers(model)
    open_cost = dg_timm.cost(model, torch.randn(1, *SIZE)).item()
    static = sum(layers(timm.create_model(name.removeprefix("dg_"))).values())
    stage_name, stage = next((n, s) for n, s in graph_stages(model).items() if len(s.block_names) > 2)
    blocks = len(stage.block_names)
    with torch.no_grad():  # close every edge into block 2: from nodes 0 and 1
        stage.get_submodule("router0").scale[1] = 0
        stage.get_submodule("router1").scale[0] = 0
        for module in (stage.get_submodule("router0"), stage.get_submodule("router1")):
            module.threshold.fill_(1e-6)
    saved = sum(v for k, v in counts.items() if k.startswith(f"{stage_name}.{stage.block_names[1]}."))
    feature = torch.Size(stage_output(model, stage_name)).numel()
    saved += counts[f"{stage_name}.router2"]
    saved += (2 + blocks - 1) * feature  # two edges in; those to blocks 3..B and to the output go out
    assert dg_timm.cost(model, torch.randn(1, *SIZE)).item() == pytest.approx(open_cost - saved / static, rel=1e-9)


def stage_output(model, name):
    shapes = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: shapes.append(out.shape[1:]))
    model.eval()(torch.randn(1, *SIZE))
    handle.remove()
    return shapes[0]


def test_images_cost_differently():
    model = randomize_graph(timm.create_model("dg_regnetx_002"), spread=20.0)
    dg_timm.set_threshold(model, 0.3)
    cost = dg_timm.cost(model, torch.randn(6, *SIZE) * torch.linspace(0, 5, 6).view(6, 1, 1, 1))
    assert cost.shape == (6,)
    assert cost.std() > 0
    assert (cost > 0.05).all()
    assert (cost < 1.1).all()


def test_a_static_network_has_no_graph_to_cost():
    with pytest.raises(ValueError, match="is a static network"):
        dg_timm.cost(timm.create_model("resnet18"), torch.randn(1, *SIZE))
