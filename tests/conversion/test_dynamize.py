"""What a converted model keeps and starts with, and what can't be converted."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import dg_timm
from dg_timm.conversion.find import find_stages
from dg_timm.graph.stage import graph_stages
from tests.helpers.networks import FAMILIES, static_and_dynamic


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_move_after_one_step_and_routers_after_two(name):
    _, model = static_and_dynamic(name, num_classes=5)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for step in (1, 2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        # an edge that is all that a BatchNorm sees has no gradient (its scale cancels), so ask for some of each stage's
        moved = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
        for stage in graph_stages(model):
            own = {key for key in moved if key.startswith(f"{stage}.router")}
            assert any(key.endswith(".scale") for key in own), (step, stage)
            assert step == 1 or any(key.endswith(".fc.weight") for key in own), (step, stage)


def test_frozen_norms_stay_frozen():
    model = timm.create_model("resnet18").train()
    model.layer2[0].bn1.eval()
    model.layer3.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    dg_timm.dynamize(model)
    assert {name: module.training for name, module in model.named_modules() if name in before} == before
    assert not any(p.requires_grad for p in model.layer3[0].parameters())
    assert all(p.requires_grad for p in model.layer3.router0.parameters())


def test_a_new_stage_follows_device_dtype_and_mode():
    model = timm.create_model("resnet18", device="meta", dtype=torch.bfloat16).train()
    dg_timm.dynamize(model)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "mobilenetv2_050"])
def test_block_shortcut_false_drops_every_shortcut(name):
    model = dg_timm.dynamize(timm.create_model(name), identity=False, edge_scale=False, block_shortcut=False)
    for stage in graph_stages(model).values():
        for block in stage[:]:
            first = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
            norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
            with torch.no_grad():
                for norm in norms:  # a block whose norms return zero returns nothing but its shortcut
                    norm.weight.zero_(), norm.bias.zero_()
                assert block.eval()(torch.randn(2, first.in_channels, 8, 8)).abs().max() == 0
    assert not any(key.endswith(".scale") for key in model.state_dict())


# What can't be converted, and stays as it was


class _Net(nn.Module):
    pass


@pytest.mark.parametrize("bad", [nn.Conv2d(3, 3, 1), nn.Sequential(), _Net(), "resnet50", None])
def test_not_a_timm_model(bad):
    with pytest.raises(TypeError, match=r"expected a timm model, got .*; make one with timm.create_model"):
        dg_timm.dynamize(bad)


@pytest.mark.parametrize("name", ["vgg11_bn", "densenet121", "vit_tiny_patch16_224", "mixer_s32_224"])
def test_no_stage_says_what_was_looked_for_and_found(name):
    model = timm.create_model(name)
    before = str(model)
    with pytest.raises(ValueError, match=r"no stage that can become a graph. Looked for: .* Found: '"):
        dg_timm.dynamize(model)
    assert str(model) == before


def test_a_model_that_takes_no_images():
    model = timm.create_model("resnet18")
    model.conv1 = nn.Identity()
    with pytest.raises(ValueError, match="can't be run on a batch of images to find its stages"):
        dg_timm.dynamize(model)
    assert not graph_stages(model)


def test_twice():
    model = dg_timm.dynamize(timm.create_model("resnet18"))
    before = str(model)
    with pytest.raises(ValueError, match="is a dynamic graph network already"):
        dg_timm.dynamize(model)
    assert str(model) == before


def test_options_that_exclude_each_other():
    model = timm.create_model("resnet18")
    before = str(model)
    for options in ({"edge_scale": False}, {"block_shortcut": False}):
        with pytest.raises(ValueError, match="identity conversion needs"):
            dg_timm.dynamize(model, **options)
    with pytest.raises(TypeError, match="edge_scale must be True or False, got 'no'"):
        dg_timm.dynamize(model, edge_scale="no")
    with pytest.raises(TypeError, match="unexpected keyword argument 'edge_scal'"):
        dg_timm.dynamize(model, edge_scal=True)
    assert str(model) == before


def test_block_shortcut_false_needs_a_known_block():
    model = timm.create_model("convnext_atto")
    before = str(model)
    with pytest.raises(
        ValueError, match=r"block_shortcut=False is offered for .*'stages.0.blocks.0' is a ConvNeXtBlock"
    ):
        dg_timm.dynamize(model, identity=False, block_shortcut=False)
    assert str(model) == before


def test_plain_alpha_with_block_shortcuts_warns():
    with pytest.warns(UserWarning, match="It belongs with block_shortcut=False"):
        dg_timm.dynamize(timm.create_model("resnet18"), identity=False, edge_scale=False)


def test_planning_changes_nothing():
    model = timm.create_model("resnet18").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_stages(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("options", [{}, {"block_shortcut": False}, {"edge_scale": False, "block_shortcut": False}])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_network_has_a_gradient_in_every_block(name, options):
    """timm zeroes the last norm of a residual block; without its shortcut such a block would be dead for ever."""
    model = timm.create_model(name, num_classes=3, **options).train()
    if hasattr(model, "init_weights"):
        model.init_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    dead = {key for key, _ in model.named_parameters() if "conv" in key}
    for _ in range(2):  # with its shortcut, a block gets its gradient once its last norm has left zero
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
        dead -= {key for key, value in model.named_parameters() if value.grad.abs().max() > 0}
        optimizer.step()
    assert not dead


@pytest.mark.parametrize("name", ["mambaout_femto"])
def test_channels_last_tensors_are_refused(name):
    with pytest.raises(ValueError, match="no stage that can become a graph"):
        dg_timm.dynamize(timm.create_model(name))


def test_checkpointing_set_before_conversion_is_kept():
    model = timm.create_model("resnet18")
    model.set_grad_checkpointing()
    dg_timm.dynamize(model)
    assert all(stage.grad_checkpointing for stage in graph_stages(model).values())
    assert model.train()(torch.randn(2, 3, 64, 64)).requires_grad


def test_parts_that_are_no_graph_still_checkpoint():
    static = timm.create_model("caformer_s18", device="meta")
    static.set_grad_checkpointing()
    model = dg_timm.dynamize(timm.create_model("caformer_s18", device="meta"))
    model.set_grad_checkpointing()
    assert static.stages[3].grad_checkpointing
    assert model.stages[3].grad_checkpointing
    assert not hasattr(model, "group_matcher")


def test_images_by_keyword_and_wrapped_traces():
    model = dg_timm.dynamize(timm.create_model("resnet18")).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x=x), model(x))
        assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(model))(x), model(x))


def test_small_configured_sizes_do_not_hide_strides():
    model = timm.create_model("mobilenetv2_050", pretrained_cfg_overlay=dict(input_size=(3, 8, 8)))
    assert dg_timm.dynamize(model)(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_layer_decay_where_timm_groups_only_some_parameters():
    model = dg_timm.dynamize(timm.create_model("hrnet_w18_small", device="meta"))
    create_optimizer_v2(model, opt="sgd", lr=0.1, layer_decay=0.8)


@pytest.mark.parametrize("place", ["layer2", "layer2.0", "layer2.1"])
def test_a_forward_that_was_put_on_a_module_stays_in_force(place):
    model = timm.create_model("resnet18").eval()
    module = model.get_submodule(place)
    own = module.forward
    module.forward = lambda x: own(x) * 0.5
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(dg_timm.dynamize(model)(x), wanted)
    assert len(graph_stages(model)) == (3 if place == "layer2" else 4)
