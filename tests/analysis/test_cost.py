"""The cost of an image against a count of what runs, layer by layer."""

import copy

import pytest
import timm
import torch
from torch import nn

import dg_timm
from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.graph.stage import graph_stages
from tests.helpers.networks import FAMILIES, randomize_graph

SIZE = (3, 64, 64)


def layers(model, prefix=""):
    """Multiply-adds of every convolution and linear layer that runs, by name."""
    counts, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):

            def count(module, args, out, name=name):
                counts[name] = out[0].numel() * module.weight[0].numel()

            handles.append(module.register_forward_hook(count))
    model.eval()(torch.randn(1, *SIZE))
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_with_every_edge_open_it_is_the_complexity(name):
    static, dynamic = timm.create_model(name.removeprefix("dg_")), timm.create_model(name)
    images = torch.randn(3, *SIZE)
    aggregation = dg_timm.complexity(dynamic, SIZE).aggregation
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
    saved += counts[f"{stage_name}.router2.fc"]
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


def twice(name):
    """A model that keeps a second, unused copy of a stage, as adapters do (peft's modules_to_save)."""
    model = timm.create_model(name, gates=True)
    stage_name = list(graph_stages(model))[1]
    model.spare = copy.deepcopy(model.get_submodule(stage_name))
    return model


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_mobilenetv2_050"])
def test_a_stage_that_does_not_run_costs_nothing(name):
    torch.manual_seed(0)
    model, images = timm.create_model(name, gates=True).eval(), torch.randn(2, *SIZE)
    other = twice(name).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    assert len(graph_stages(other)) == len(graph_stages(model)) + 1
    assert torch.equal(dg_timm.cost(other, images), dg_timm.cost(model, images))
    assert dg_timm.adjacency(other, images).keys() == dg_timm.adjacency(model, images).keys()
    with ExpectedCost(other, SIZE).recording(2) as costs:
        other(images)
    assert torch.allclose(costs()[0].double(), dg_timm.cost(model, images))
    one, two = dg_timm.complexity(model, SIZE), dg_timm.complexity(other, SIZE)
    assert (one.convolutions, one.aggregation) == (two.convolutions, two.aggregation)
    assert two.params > one.params
    topology = dg_timm.majority_topology(model, [images])
    assert dg_timm.majority_topology(other, [images]).keys() == topology.keys()


def test_the_cost_below_an_adapter_that_keeps_the_old_layers():
    """peft's modules_to_save holds a layer twice, and runs one."""
    peft = pytest.importorskip("peft", reason="the extra 'downstream' brings peft")
    model, images = timm.create_model("dg_resnet18", num_classes=3).eval(), torch.randn(2, *SIZE)
    wanted, alphas = dg_timm.cost(model, images), dg_timm.adjacency(model, images)
    config = peft.LoraConfig(target_modules=r".*conv2", r=1, modules_to_save=["layer4", "fc"])
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    assert len(graph_stages(adapted)) == 5
    found = dg_timm.adjacency(adapted, images)
    assert [len(alpha) for alpha in found.values()] == [2] * 4
    assert all(torch.equal(a, b) for a, b in zip(found.values(), alphas.values(), strict=True))
    cost = dg_timm.cost(adapted, images)
    assert torch.allclose(cost, wanted, atol=1e-3)  # the low-rank layers count in both networks


def test_counting_leaves_the_model_as_it_was():
    model = randomize_graph(timm.create_model("dg_regnety_002", gates=True)).train()
    dg_timm.set_threshold(model, 0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dg_timm.set_execution(model.eval(), "sparse")
    model.train()
    for call in (lambda: dg_timm.complexity(model, SIZE), lambda: dg_timm.cost(model, torch.randn(1, *SIZE)),
                 lambda: ExpectedCost(model, SIZE)):  # fmt: skip
        call()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {stage.execution for stage in graph_stages(model).values()} == {"sparse"}
    assert not any(module._forward_hooks for module in model.modules())


def test_the_complexity_of_the_paper_is_that_of_its_networks():
    """Table 1: ResNet-50 has 4.1 GFLOPs, and its graph some more."""
    static, dynamic = (
        dg_timm.complexity(timm.create_model(name, device="meta")) for name in ("resnet50", "dg_resnet50")
    )
    assert static.aggregation == 0
    assert static.multiply_adds == static.convolutions == pytest.approx(4.09e9, rel=0.01)
    assert dynamic.convolutions == static.convolutions
    assert 0 < dynamic.aggregation < 0.02 * static.convolutions
    assert dynamic.multiply_adds == dynamic.convolutions + dynamic.aggregation
    assert 1 < dynamic.params / static.params < 1.01


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo):
        raise TypeError("can't be copied")


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_can_not_be_counted_says_so():
    model, images = timm.create_model("dg_cifar_resnet20").eval(), torch.randn(2, 3, 32, 32)
    wanted = dg_timm.adjacency(model, images)
    for spoilt in (torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}), copy.deepcopy(model)):
        if not any("quantized" in type(module).__module__ for module in spoilt.modules()):
            spoilt.lock = Uncopyable()
        with pytest.raises(dg_timm.UserError, match=r"can't be run on a copy without numbers .*; count it before"):
            dg_timm.cost(spoilt, images)
        found = dg_timm.adjacency(spoilt, images)
        assert {name: alpha.shape for name, alpha in found.items()} == {n: a.shape for n, a in wanted.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
@pytest.mark.parametrize("look", [dg_timm.cost, dg_timm.adjacency, dg_timm.skipped_nodes])
def test_images_of_another_type_are_named(dtype, look):
    model = timm.create_model("dg_cifar_resnet20").eval()
    with pytest.raises(dg_timm.UserError, match=f"images are {dtype} and the model is torch.float32"):
        look(model, torch.zeros(2, 3, 32, 32, dtype=dtype))
