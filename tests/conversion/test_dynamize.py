"""Identity conversion of any timm model, and what can't be converted."""

import copy
import pickle

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import dg_timm
from dg_timm.conversion.find import find_stages
from dg_timm.graph.stage import graph_stages
from tests.helpers.networks import FAMILIES, ZOO, randomize, static_and_dynamic

# beyond the zoo: other containers, preactivation, split attention, anti-aliasing, layer scale, channels-last blocks
OTHERS = [
    "resnet50d", "seresnet50", "ecaresnet26t", "resnetblur50", "skresnet18", "res2net50_26w_4s", "resnest26d",
    "resnetv2_50", "regnetz_b16", "regnetv_040", "efficientnetv2_rw_t", "mobilenetv3_small_050",
    "mobilenetv4_conv_small", "mnasnet_small", "tinynet_e", "convnext_atto", "convnextv2_atto", "repvgg_a0",
    "gernet_s", "darknet53", "cspresnet50", "nf_regnet_b0", "fastvit_t8", "hrnet_w18_small", "ghostnet_050",
    "edgenext_xx_small", "inception_next_atto",
]  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_zoo_identity_is_exact(name):
    static, dynamic = static_and_dynamic(name)
    x = torch.randn(2, 3, 96, 80)
    with torch.no_grad():
        assert torch.equal(dynamic(x), static(x))


@pytest.mark.parametrize("name", OTHERS)
def test_any_timm_model_identity_is_exact(name):
    static = randomize(timm.create_model(name))
    dynamic = dg_timm.dynamize(copy.deepcopy(static))
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(dynamic(x), static(x))
        assert set(static.state_dict()) < set(dynamic.state_dict())
        assert isinstance(dynamic, type(static))
        assert len(dg_timm.adjacency(dynamic, x)) == len(graph_stages(dynamic)) > 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", FAMILIES)
def test_identity_in_train_mode_and_both_layouts(name, memory_format):
    static, dynamic = (m.to(memory_format=memory_format).train() for m in static_and_dynamic(name, drop_path_rate=0.0))
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=memory_format)
    assert torch.equal(dynamic(x), static(x))
    for key, value in static.state_dict().items():
        assert torch.equal(dynamic.state_dict()[key], value), key  # BatchNorm has seen the same batch, once


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("feature_cls", [None, "dict", "hook", "getter", "fx"])
def test_identity_in_features_only(name, feature_cls):
    static = randomize(timm.create_model(name.removeprefix("dg_")))
    options = dict(pretrained=True, features_only=True, pretrained_cfg_overlay=dict(state_dict=static.state_dict()))
    if feature_cls is not None:
        options["feature_cls"] = feature_cls
    dynamic = timm.create_model(name, **options).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = static.forward_intermediates(x, intermediates_only=True)
        got = dynamic(x)
    got = list(got.values()) if isinstance(got, dict) else got
    wanted = wanted[-len(got) :]  # the getter leaves out the stem by default
    assert len(got) == len(dynamic.feature_info.channels()) >= 4
    for g, w, channels in zip(got, wanted, dynamic.feature_info.channels(), strict=True):
        assert torch.equal(g, w)
        assert g.shape[1] == channels


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "regnetx_002"])
@pytest.mark.parametrize("feature_cls", [None, "dict", "hook"])
def test_a_feature_extractor_can_be_converted_itself(name, feature_cls):
    options = {} if feature_cls is None else {"feature_cls": feature_cls}
    if name.startswith("mobilenet") and feature_cls == "dict":
        options["feature_cfg"] = dict(flatten_sequential=True)
    static = randomize(timm.create_model(name, features_only=True, **options))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = static(x)
        dynamic = dg_timm.dynamize(static)
        got = dynamic(x)
    assert graph_stages(dynamic)
    wanted, got = (list(f.values()) if isinstance(f, dict) else f for f in (wanted, got))
    assert len(got) == 5
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


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


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_and_pickles(name):
    _, model = static_and_dynamic(name)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), timm.utils.ModelEmaV3(model).module):
            assert type(twin) is type(model)
            assert torch.equal(twin(x), wanted)
            assert next(twin.parameters()) is not next(model.parameters())


def test_frozen_norms_stay_frozen():
    model = timm.create_model("resnet18").train()
    model.layer2[0].bn1.eval()
    model.layer3.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    dg_timm.dynamize(model)
    assert {name: module.training for name, module in model.named_modules() if name in before} == before
    assert not any(p.requires_grad for p in model.layer3[0].parameters())
    assert all(p.requires_grad for p in model.layer3.router0.parameters())


def test_frozen_batch_norm_modules_convert_too():
    static = timm.utils.model.freeze_batch_norm_2d(randomize(timm.create_model("mobilenetv2_050")))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = static(x)
        assert torch.equal(dg_timm.dynamize(static)(x), wanted)


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


# Found by a reader of the first version


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


def test_loading_a_head_leaves_the_graph_alone():
    model = timm.create_model("dg_resnet18", num_classes=3)
    nn.init.constant_(model.layer2.router0.scale, 0.7)
    head = {key: value for key, value in model.state_dict().items() if key.startswith("fc.")}
    for part in (head, {}):
        assert model.load_state_dict(part, strict=False).missing_keys
        assert (model.layer2.router0.scale == 0.7).all()


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
