"""What timm asks of a model, for one model of each family; the rest is timm's own suite."""

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2

import dg_timm
from dg_timm.graph.stage import graph_stages, routers
from tests.helpers.networks import FAMILIES, QUICK_FAMILIES, ZOO, randomize, randomize_graph, static_and_dynamic


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
            for added, block in stage.added_modules().items():
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


@pytest.mark.parametrize("name", QUICK_FAMILIES)
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


@pytest.mark.parametrize("name", QUICK_FAMILIES)
def test_exports_with_a_dynamic_batch(name):
    _, model = static_and_dynamic(name, num_classes=3)
    randomize_graph(model)
    x = torch.randn(5, 3, 64, 64)
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-4)


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
