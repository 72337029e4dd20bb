"""timm's contract, for every model because it is in the registry; heavier checks for one model of each family."""

import json
import warnings

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2

import dg_timm
from dg_timm.benchmarks.table1 import TABLE_1
from dg_timm.graph.stage import DGStage, graph_stages, routers
from tests.helpers.networks import FAMILIES, ZOO, randomize, randomize_graph, static_and_dynamic


def test_the_zoo_is_the_table():
    assert len(ZOO) == len(set(dg_timm.models.registry.VARIANTS)) == 28
    assert {f"dg_{name}" for name in dg_timm.models.registry.VARIANTS} == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_tags_are_timms_and_name_timms_weights(name):
    assert timm.is_model(name)
    static = get_arch_pretrained_cfgs(name.removeprefix("dg_"))
    trained = [key for key in dg_timm.models.registry.TRAINED if key.partition(".")[0] == name]
    ours = {key: cfg for key, cfg in get_arch_pretrained_cfgs(name).items() if key not in trained}
    if trained:
        assert timm.get_pretrained_cfg(name).file == str(
            dg_timm.models.registry.TRAINED[trained[0]] / "model.safetensors"
        )
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
    counted = dg_timm.analysis.counting(timm.create_model(f"dg_{name}", device="meta"), (3, 224, 224))
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


@pytest.mark.parametrize("name", ZOO)
def test_routers_share_their_blocks_group(name):
    model = timm.create_model(name, device="meta")
    static = timm.create_model(name.removeprefix("dg_"), device="meta")
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        wanted = group_parameters(static, static.group_matcher(coarse=coarse), reverse=True)
        for key, group in wanted.items():
            assert groups[key] == group, key
        for stage_name, stage in graph_stages(model).items():
            for added, block in stage.graph_modules().items():
                block_group = next(g for key, g in wanted.items() if key.startswith(f"{stage_name}.{block}."))
                for key in groups:
                    if key.startswith(f"{stage_name}.{added}."):
                        assert groups[key] == block_group, key


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_and_thresholds_never_decay(name):
    model = timm.create_model(name)
    own = {id(p) for r in routers(model).values() for p in (r.scale, r.threshold)}
    assert len(model.no_weight_decay()) >= len(own) > 0
    for options in ({}, {"layer_decay": 0.8}, {"filter_bias_and_bn": False}):
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1, **options)
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
        assert decayed
        if "filter_bias_and_bn" not in options:  # without it timm asks no model what not to decay
            assert not own & decayed
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_reaches_every_stage_and_changes_nothing(name):
    _, model = static_and_dynamic(name, num_classes=7)
    randomize_graph(model, 0.3).train()
    x, results = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        torch.manual_seed(1)
        model.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing == enable for stage in graph_stages(model).values())
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
        results.append([out, *(p.grad.clone() for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_init_weights_starts_the_graph_again(name):
    model = timm.create_model(name)
    if not hasattr(timm.create_model(name.removeprefix("dg_"), device="meta"), "init_weights"):
        assert not hasattr(model, "init_weights")
        return
    fresh = {key: value.clone() for key, value in model.state_dict().items() if ".router" in key}
    randomize_graph(model)
    model.init_weights()
    for key, value in fresh.items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_is_the_mean_of_predecessors(name):
    model = timm.create_model(name).eval()
    for alpha in dg_timm.adjacency(model, torch.randn(2, 3, 64, 64)).values():
        torch.testing.assert_close(alpha.sum(1)[:, 1:], torch.ones_like(alpha[:, 0, 1:]))  # each node's input weights


@pytest.mark.parametrize("name", FAMILIES)
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


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", FAMILIES)
def test_output_stride(name, output_stride):
    static, dynamic = static_and_dynamic(name, output_stride=output_stride, num_classes=0, global_pool="")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(dynamic(x), static(x))
        assert dynamic(x).shape[-1] == 64 // output_stride


@pytest.mark.parametrize("name", FAMILIES)
def test_out_indices_choose_features(name):
    model = timm.create_model(name, features_only=True, out_indices=(1, 3)).eval()
    assert [f.shape[-1] for f in model(torch.randn(1, 3, 64, 64))] == [64 // r for r in model.feature_info.reduction()]
    assert len(model.feature_info.channels()) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_drop_path_reaches_the_blocks(name):
    model = randomize(timm.create_model(name, drop_path_rate=0.5)).train()
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert max(rates) > 0.3
    x = torch.randn(8, 3, 64, 64)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_whole_and_once_for_any_batch_content(name):
    torch._dynamo.reset()
    _, model = static_and_dynamic(name, num_classes=3)
    randomize_graph(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for _ in range(3):  # fresh images: other edges close
            x = torch.randn(2, 3, 64, 64)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_scripts_with_closed_edges(name):
    _, model = static_and_dynamic(name)
    randomize_graph(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(x), wanted, rtol=1e-4, atol=1e-4)
        assert any((alpha.triu(1) == 0).sum() > alpha.numel() / 2 for alpha in dg_timm.adjacency(model, x).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_exports_with_a_dynamic_batch(name):
    _, model = static_and_dynamic(name, num_classes=3)
    randomize_graph(model)
    x = torch.randn(5, 3, 64, 64)
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
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
    assert json.loads((tmp_path / "timm/config.json").read_text())["model_args"]["block_shortcut"] is False
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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 3), (1, 2, 3, 64, 64)])
def test_wrong_images(name, shape):
    model = timm.create_model(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for call in (model, lambda x: dg_timm.adjacency(model, x)):
        with pytest.raises(ValueError, match="expected images"):
            call(torch.randn(shape))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


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
