"""The zoo: its names, tags, weights and options, for every model because it is in the registry."""

import json
import warnings

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs

import dg_timm
from dg_timm._errors import BadType, BadValue
from dg_timm.benchmarks.table1 import TABLE_1
from dg_timm.graph.stage import DGStage, graph_stages
from tests.helpers.networks import FAMILIES, QUICK_FAMILIES, ZOO, randomize, randomize_graph, static_and_dynamic
from tests.helpers.scripts import python


def test_the_zoo_is_the_table():
    assert len(ZOO) == len(set(dg_timm.models.STATIC_MODELS)) == 28
    assert {f"dg_{name}" for name in dg_timm.models.STATIC_MODELS} == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_tags_are_timms_and_name_timms_weights(name):
    assert timm.is_model(name)
    static = get_arch_pretrained_cfgs(name.removeprefix("dg_"))
    trained = [key for key in dg_timm.models.BUNDLED if key.partition(".")[0] == name]
    ours = {key: cfg for key, cfg in get_arch_pretrained_cfgs(name).items() if key not in trained}
    if trained:
        assert timm.get_pretrained_cfg(name).file == str(dg_timm.models.BUNDLED[trained[0]] / "model.safetensors")
        static = {key: cfg for key, cfg in static.items() if cfg.has_weights}
    assert list(ours) == [f"dg_{key}" for key in static]
    for key, cfg in static.items():
        wanted = {**cfg.to_dict(), "architecture": name}
        assert ours[f"dg_{key}"].to_dict() == wanted
        assert (f"dg_{key}" in timm.list_pretrained("dg_*")) == bool(cfg.has_weights)
    default = timm.get_pretrained_cfg(name)
    assert default.hf_hub_id == timm.get_pretrained_cfg(name.removeprefix("dg_")).hf_hub_id


@pytest.mark.parametrize("name", TABLE_1)
def test_parameters_and_multiply_adds_of_table_1(name):
    params, flops = TABLE_1[name]
    counted = dg_timm.complexity(timm.create_model(f"dg_{name}", device="meta"), (3, 224, 224))
    assert counted.params / 1e6 == pytest.approx(params, rel=0.003)
    assert counted.multiply_adds / 1e6 == pytest.approx(flops, rel=0.015)


@pytest.mark.parametrize("name", ZOO)
def test_state_dict_adds_to_timms_and_names_stay(name):
    static = timm.create_model(name.removeprefix("dg_"), device="meta")
    model = timm.create_model(name, device="meta")
    added = set(model.state_dict()) - set(static.state_dict())
    assert set(static.state_dict()) < set(model.state_dict())
    assert isinstance(model, type(static))
    for key in added:
        leaf = key.split(".")[-3] if ".fc." in key or ".projection." in key else key.split(".")[-2]
        assert leaf.removeprefix("router").isdigit() or leaf == "projection", key


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_mobilenetv2_050"])
def test_state_dict_names_are_forever(name):
    """Weights on the Hub depend on these names; a change here breaks them."""
    keys = set(timm.create_model(name, device="meta").state_dict())
    stage = {"dg_resnet18": "layer2", "dg_mobilenetv2_050": "blocks.1"}[name]
    for node in (0, 1, 2):
        for leaf in ("fc.weight", "fc.bias", "scale", "threshold"):
            assert f"{stage}.router{node}.{leaf}" in keys
    assert (f"{stage}.projection.conv.weight" in keys) == (name == "dg_mobilenetv2_050")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_is_the_mean_of_predecessors(name):
    model = timm.create_model(name).eval()
    for alpha in dg_timm.adjacency(model, torch.randn(2, 3, 64, 64)).values():
        torch.testing.assert_close(alpha.sum(1)[:, 1:], torch.ones_like(alpha[:, 0, 1:]))  # each node's input weights


@pytest.mark.parametrize("name", QUICK_FAMILIES)
def test_a_static_checkpoint_is_the_identity_by_every_way(name, tmp_path):
    static, by_filter = static_and_dynamic(name)
    path = tmp_path / "static.pt"
    torch.save(static.state_dict(), path)
    by_path = timm.create_model(name, checkpoint_path=str(path)).eval()
    by_file = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    by_hand = timm.create_model(name).eval()
    by_hand.load_state_dict(static.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for model in (by_filter, by_path, by_file, by_hand):
            assert torch.equal(model(x), static(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_in_chans_and_num_classes_adapt_as_in_timm(name):
    source = randomize(timm.create_model(name.removeprefix("dg_")))
    overlay = dict(state_dict=source.state_dict())
    options = dict(pretrained=True, in_chans=1, num_classes=0, pretrained_cfg_overlay=overlay)
    static = timm.create_model(name.removeprefix("dg_"), **options).eval()
    dynamic = timm.create_model(name, **options).eval()
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(dynamic(x), static(x))
    dynamic.reset_classifier(4, "max")
    assert dynamic(x).shape == (1, 4)


@pytest.mark.parametrize("name", QUICK_FAMILIES)
def test_own_options_survive_save_and_load(name, tmp_path):
    model = timm.create_model(name, edge_scale=False, block_shortcut=False, num_classes=3, in_chans=1)
    randomize_graph(model).eval()
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert not any(stage.edge_scale or stage.block_shortcut for stage in graph_stages(again).values())
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    timm.models.save_for_hf(model, str(tmp_path / "timm"), safe_serialization=True)  # timm's own way
    assert (
        json.loads((tmp_path / "timm/config.json").read_text(encoding="utf-8"))["model_args"]["block_shortcut"] is False
    )
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(x), model(x))


def test_features_of_a_dynamic_checkpoint(tmp_path):
    model = randomize_graph(randomize(timm.create_model("dg_mobilenetv2_050", num_classes=3)))
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for got, wanted in zip(features(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(got, wanted)


def test_unknown_keyword_and_tag():
    with pytest.raises(TypeError, match="edge_scal"):
        timm.create_model("dg_resnet18", edge_scal=True)
    with pytest.raises(TypeError, match="edge_scale must be True or False, got 1"):
        timm.create_model("dg_resnet18", edge_scale=1)
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(zzz\) for dg_resnet18"):
        timm.create_model("dg_resnet18.zzz")


def test_fixed_edges_start_as_the_identity_and_survive_save_and_load(tmp_path):
    """Table 6's alpha: from a static checkpoint the same function, bit for bit, and built again with its option."""
    static = randomize(timm.create_model("resnet18", num_classes=3)).eval()
    overlay = dict(state_dict=static.state_dict(), num_classes=3)
    model = timm.create_model("dg_resnet18", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3,
                              instance_aware=False).eval()  # fmt: skip
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), static(x))
    assert dg_timm.conversion.state_dict.is_identity(model)
    dynamic = timm.create_model("dg_resnet18", num_classes=3)
    assert dg_timm.cost(model, x).max() < dg_timm.cost(dynamic, x).max()  # its routers multiply nothing
    again = timm.create_model(f"local-dir:{dg_timm.save_pretrained(model, tmp_path / 'model')}", pretrained=True).eval()
    assert not any(stage.instance_aware for stage in graph_stages(again).values())
    assert torch.equal(again(x), model(x))
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))


@pytest.mark.parametrize("options", [{"edge_scale": False}, {"block_shortcut": False}])
def test_static_weights_refuse_options_without_an_identity(options):
    overlay = dict(state_dict=timm.create_model("resnet18").state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # edge_scale=False warns, which is tested elsewhere
        with pytest.raises(ValueError, match="a static checkpoint can't be loaded with edge_scale=False"):
            timm.create_model("dg_resnet18", pretrained=True, pretrained_cfg_overlay=overlay, **options)


def _stage_stds(model, names, x):
    stds = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: stds.update({name: out.std()}))
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return stds


@pytest.mark.parametrize(
    "name", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
)
def test_from_scratch_every_stage_starts_near_the_static_deviation(name):
    static, dynamic = timm.create_model(name.removeprefix("dg_")).train(), timm.create_model(name).train()
    names, x = list(graph_stages(dynamic)), torch.randn(4, 3, 96, 96)
    wanted, got = _stage_stds(static, names, x), _stage_stds(dynamic, names, x)
    for stage in names:
        assert 0.5 < got[stage] / wanted[stage] < 2, (stage, got[stage], wanted[stage])


def test_a_graph_stage_is_where_a_stage_was():
    model = timm.create_model("dg_resnet18", device="meta")
    assert [n for n, _ in model.named_children()] == [
        n for n, _ in timm.create_model("resnet18", device="meta").named_children()
    ]
    assert isinstance(model.layer3, DGStage)
    assert model.layer3[-1] is model.get_submodule("layer3.1")


# --------------------------------------------------------------------------- names outside the zoo


def test_any_other_timm_model_can_be_registered():
    """In a process of its own: what is registered stays."""
    script = """
import dg_timm, timm, torch
assert not timm.is_model("dg_convnext_atto")
dg_timm.models.register("dg_convnext_atto.d2_in1k")
dg_timm.models.register("dg_convnext_atto")  # a second time changes nothing
assert timm.get_pretrained_cfg("dg_convnext_atto").hf_hub_id == timm.get_pretrained_cfg("convnext_atto").hf_hub_id
static = timm.create_model("convnext_atto", num_classes=3).eval()
weights = dict(state_dict=static.state_dict(), num_classes=3)
model = timm.create_model("dg_convnext_atto", pretrained=True, pretrained_cfg_overlay=weights, num_classes=3).eval()
x = torch.randn(1, 3, 64, 64)
assert torch.equal(model(x), static(x))
assert len(dg_timm.models.STATIC_MODELS) == 28
"""
    process = python("-c", script)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("convnext_atto", BadValue, 'begins with "dg_", got \'convnext_atto\'; give "dg_convnext_atto"'),
        ("dg_convnxt_atto", BadValue, "timm has no model 'convnxt_atto'; the nearest names are convnext_atto"),
        ("dg_", BadValue, "timm has no model ''"),
        ("", BadValue, 'begins with "dg_"'),
        ("dg_dg_resnet18", BadValue, "dg_resnet18 is a dynamic network, and can't be converted again"),
        (3, BadType, "name must be a string, got int"),
    ],
)
def test_what_can_not_be_registered(name, error, match):
    before = timm.list_models()
    with pytest.raises(error, match=match):
        dg_timm.models.register(name)
    dg_timm.models.registry.try_register(name)  # of names that are checked later nothing is said
    assert timm.list_models() == before


def test_a_zoo_name_is_registered_already():
    before = timm.list_models("dg_*")
    dg_timm.models.register("dg_resnet50.a1_in1k")
    assert timm.list_models("dg_*") == before


def test_weights_can_not_be_loaded_loosely():
    with pytest.raises(BadType, match="pretrained_strict=False would leave parts of the network random"):
        timm.create_model("dg_resnet18", pretrained_strict=False)
