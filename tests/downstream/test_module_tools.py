"""Tools that take a model apart and put other modules, hooks or tensors in: the graph's own layers take part."""

import copy
import threading

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import dg_timm
from dg_timm.graph.stage import graph_stages, routers
from tests.helpers.networks import FAMILIES, randomize, randomize_graph

SMALL = ["dg_resnet18", "dg_mobilenetv2_050", "dg_regnety_002"]
IMAGES = (2, 3, 64, 64)


def trained(name):
    """A network whose routers decide by image."""
    return randomize_graph(randomize(timm.create_model(name, num_classes=10)))


def learn(model):
    model(torch.randn(IMAGES)).logsumexp(1).mean().backward()


@pytest.mark.parametrize("name", SMALL)
def test_adapters_in_routers_learn_and_count(name):
    peft = pytest.importorskip("peft", reason="the extra 'downstream' brings peft")
    config = peft.LoraConfig(target_modules=r".*router\d+\.fc|fc|classifier|head\.fc", r=2, init_lora_weights=False)
    plain = trained(name)
    x = torch.randn(IMAGES)
    before = dg_timm.adjacency(plain, x)
    model = peft.get_peft_model(plain, config)
    assert sum("router" in key and "lora" in key for key, _ in model.named_parameters()) > 10
    learn(model.train())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    after = dg_timm.adjacency(model, x)
    assert any(not torch.equal(a, b) for a, b in zip(after.values(), before.values(), strict=True))
    sparse = copy.deepcopy(model).eval()
    dg_timm.set_execution(sparse, "sparse")
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["fc", "base"])
def test_hooks_on_a_router_are_called(part):
    model, seen = trained("dg_resnet18"), []
    for router in routers(model).values():
        (router.fc if part == "fc" else router).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        for execution in ("dense", "sparse"):
            dg_timm.set_execution(model, execution)
            seen.clear()
            model(torch.randn(IMAGES))
            assert execution == "sparse" or len(seen) == len(routers(model))
            assert seen


@pytest.mark.parametrize("name", SMALL)
def test_pruned_everywhere_it_trains_and_predicts_alike(name):
    model = trained(name)
    layers = [(m, "weight") for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.3)
    for _ in range(2):
        learn(model.train())
    assert all(router.fc.weight_orig.grad is not None for router in routers(model).values())
    x = torch.randn(IMAGES)
    alphas, cost = dg_timm.adjacency(model, x), dg_timm.cost(model, x)  # in train mode: looked at through a copy
    assert model.training
    with torch.no_grad():
        dense = model.eval()(x)
        dg_timm.set_execution(model, "sparse")
        torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-4)
    assert alphas.keys() == dg_timm.adjacency(model, x).keys()
    assert torch.equal(dg_timm.cost(model, x), cost)


@pytest.mark.parametrize("name", SMALL)
def test_parametrized_routers(name):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, x = trained(name), torch.randn(IMAGES)
    wanted = copy.deepcopy(model)
    for router in routers(wanted).values():
        with torch.no_grad():
            router.fc.weight.mul_(2)
            router.scale.mul_(2)
    for router in routers(model).values():
        parametrize.register_parametrization(router.fc, "weight", Doubled())
        parametrize.register_parametrization(router, "scale", Doubled())
    with torch.no_grad():
        for execution in ("dense", "sparse"):
            dg_timm.set_execution(model, execution)
            torch.testing.assert_close(model(x), wanted(x), rtol=1e-4, atol=1e-4)
    dg_timm.set_execution(model, "dense")
    learn(model.train())
    assert all(router.fc.parametrizations.weight.original.grad is not None for router in routers(model).values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", SMALL)
def test_dynamic_quantization_takes_the_routers_layers(name):
    model, x = trained(name), torch.randn(IMAGES)
    dg_timm.set_threshold(model, 0.0)  # a rounded router may decide otherwise
    with torch.no_grad():
        wanted = model(x)
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        assert all(type(router.fc) is not nn.Linear for router in routers(small).values())
        dense = small(x)
        assert 0 < (dense - wanted).norm() < wanted.norm()  # routers of random weights decide by little
        dg_timm.set_execution(small, "sparse")
        torch.testing.assert_close(small(x), dense, rtol=1e-3, atol=1e-3 * dense.abs().max().item())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min", "ignore:must run observer")
@pytest.mark.parametrize("name", SMALL)
def test_every_fake_quantizer_sees_data(name):
    quantization = torch.ao.quantization
    model = trained(name).train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model, inplace=True)
    learn(model)
    found = {key: m for key, m in model.named_modules() if isinstance(m, quantization.FakeQuantize)}
    observed = {key: m.activation_post_process for key, m in found.items()}
    assert any("router" in key for key in observed)
    blind = [key for key, o in observed.items() if hasattr(o, "min_val") and not torch.isfinite(o.min_val).all()]
    assert blind == []


@pytest.mark.parametrize("name", SMALL)
def test_offloaded_weights_come_when_they_are_asked_for(name):
    accelerate = pytest.importorskip("accelerate")
    model, x = trained(name), torch.randn(IMAGES)
    with torch.no_grad():
        wanted = model(x)
        alphas = dg_timm.adjacency(model, x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(router.scale.is_meta for router in routers(model).values())
    with torch.no_grad():
        for execution in ("dense", "sparse"):
            dg_timm.set_execution(model, execution)
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
        dg_timm.set_execution(model, "dense")
        again = dg_timm.adjacency(model, x)
    assert all(torch.equal(again[key], alphas[key]) for key in alphas)
    assert torch.allclose(dg_timm.cost(model, x), dg_timm.analysis.counting.relative_cost(model, alphas, IMAGES[1:]))


@pytest.mark.parametrize("name", SMALL)
def test_activations_on_another_device(name):
    model, x = trained(name).double().train(), torch.randn(IMAGES, dtype=torch.float64)
    start, grads = copy.deepcopy(model.state_dict()), []
    for offload in (False, True):
        model.load_state_dict(start)
        model.zero_grad()
        if offload:
            with torch.autograd.graph.save_on_cpu():
                loss = model(x).square().mean()
        else:
            loss = model(x).square().mean()
        loss.backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters()})
    for key, wanted in grads[0].items():
        torch.testing.assert_close(grads[1][key], wanted)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("name", ["dg_resnet18"])
def test_channels_can_be_pruned(name):
    pruning = pytest.importorskip("torch_pruning", reason="the extra 'downstream' brings torch-pruning")
    model, x = trained(name), torch.randn(1, *IMAGES[1:])
    kept = [m for m in model.modules() if isinstance(m, nn.Linear)]
    before = sum(p.numel() for p in model.parameters())
    importance = pruning.importance.MagnitudeImportance(p=1)
    pruning.pruner.MagnitudePruner(model, x, importance=importance, pruning_ratio=0.5, ignored_layers=kept).step()
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    learn(model.train())
    with torch.no_grad():
        dense = model.eval()(x)
        dg_timm.set_execution(model, "sparse")
        torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_traced_with_gradients_on(name):
    """As in every tutorial; TensorBoard's add_graph does the same."""
    model, x = trained(name), torch.randn(IMAGES)
    with pytest.warns(FutureWarning, match="deprecated"):
        traced = torch.jit.trace(model, x, check_tolerance=1e-4)
    other = torch.randn(3, *IMAGES[1:])
    with torch.no_grad():
        torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_every_module_with_weights_runs_inside_its_parent(name):
    """What walks the module tree (a summary, sharding by block) sees each module called while its parent runs."""
    model, inside, strays = trained(name), [], []
    parents = {f"{p}.{c}" if p else c: p for p, m in model.named_modules() for c, _ in m.named_children()}
    has_weights = {key for key, m in model.named_modules() if next(m.parameters(), None) is not None}

    def enter(key):
        def hook(module, args):
            if key and parents[key] in has_weights and parents[key] not in inside:
                strays.append(key)
            inside.append(key)

        return hook

    for key, module in model.named_modules():
        module.register_forward_pre_hook(enter(key))
        module.register_forward_hook(lambda *_, key=key: inside.remove(key))
    with torch.no_grad():
        model(torch.randn(IMAGES))
    assert strays == []
    assert inside == []


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_regnety_002", "dg_mobilenetv2_050"])
def test_blocks_are_checkpointed_by_torchs_wrapper(name):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = randomize_graph(randomize(timm.create_model(name, num_classes=3)), spread=0.3)
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for stage in graph_stages(model).values():
        for block in stage.block_names:
            setattr(stage, block, checkpoint_wrapper(stage.get_submodule(block)))
    model(x).square().sum().backward()
    found = {key.replace("_checkpoint_wrapped_module.", ""): p.grad for key, p in model.named_parameters()}
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_mobilenetv2_050"])
def test_torchvision_extracts_features(name):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = randomize_graph(randomize(timm.create_model(name, num_classes=3))).eval()
    stage, x = next(iter(graph_stages(model))), torch.randn(2, 3, 64, 64)
    kept = []
    handle = model.get_submodule(stage).register_forward_hook(lambda module, args, result: kept.append(result))
    with torch.no_grad():
        model(x)
        handle.remove()
        found = create_feature_extractor(model, {stage: "feature"})(x)["feature"]
    torch.testing.assert_close(found, kept[0])


class Taps:
    """Keeps features, as tools do; it can't be copied."""

    def __init__(self):
        self.kept, self.lock = [], threading.Lock()

    def hook(self, module, args, result):
        self.kept.append(result)


def test_hooks_whose_owner_can_not_be_copied_are_in_nobodys_way():
    taps, x = Taps(), torch.randn(2, 3, 64, 64)
    static = timm.create_model("resnet18", num_classes=3)
    static.layer3[0].conv1.register_forward_hook(taps.hook)
    static(x)
    model = dg_timm.dynamize(static)
    model(x)  # in training mode: features with gradients are kept
    assert dg_timm.cost(model, x).shape == (2,)
    assert dg_timm.complexity(model).params > 0
    modes = []
    model.layer1[0].register_forward_pre_hook(lambda module, args: modes.append(model.training))
    dg_timm.adjacency(model, x)
    assert set(modes) == {True}  # the shared model was not switched
