"""The promise: converted, a network predicts bit for bit what it did, whatever is asked of it, and however often.

Batches run through 1..64 because libraries change algorithms with the size (torch 2.14.1 leaves oneDNN below 16 images
on one thread), and a call comes several times because a batch may run in chunks from its third time on.
"""

import contextlib
import copy
import itertools

import pytest
import timm
import torch

import dg_timm
from dg_timm.execution import chunking
from dg_timm.graph.stage import graph_stages
from tests.helpers.maps import LAYOUTS
from tests.helpers.networks import FAMILIES, ZOO, randomize, static_and_dynamic

SOME_BATCHES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64)
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}

# beyond the zoo: other containers, preactivation, split attention, anti-aliasing, layer scale, channels-last blocks
OTHERS = [
    "resnet50d", "seresnet50", "ecaresnet26t", "resnetblur50", "skresnet18", "res2net50_26w_4s", "resnest26d",
    "resnetv2_50", "regnetz_b16", "regnetv_040", "efficientnetv2_rw_t", "mobilenetv3_small_050",
    "mobilenetv4_conv_small", "mnasnet_small", "tinynet_e", "convnext_atto", "convnextv2_atto", "repvgg_a0",
    "gernet_s", "darknet53", "cspresnet50", "nf_regnet_b0", "fastvit_t8", "hrnet_w18_small", "ghostnet_050",
    "edgenext_xx_small", "inception_next_atto",
]  # fmt: skip


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layouts_of(static, dynamic):
    """The two networks and a layout, in each layout."""
    for layout in LAYOUTS:
        yield static.to(memory_format=layout), dynamic.to(memory_format=layout), layout


def differing(static, dynamic, batches, size=64, number_of_threads=(1,), modes=("no_grad",), calls=3):
    """The settings in which a call of the dynamic network is not what the static one gives."""
    found = []
    for static_, dynamic_, layout in layouts_of(static, dynamic):
        for number, batch in itertools.product(number_of_threads, batches):
            x = torch.randn(batch, 3, size, size).contiguous(memory_format=layout)
            with threads(number), torch.no_grad():
                wanted = static_(x)
            for mode in modes:
                with threads(number), MODES[mode]():
                    same = [torch.equal(dynamic_(x), wanted) for _ in range(calls if mode == "no_grad" else 1)]
                if not all(same):
                    found.append((batch, str(layout), f"{number} threads", mode, same))
    return found


@pytest.mark.parametrize("name", ["dg_tf_efficientnet_lite0", "dg_mobilenetv2_050", "dg_cifar_resnet20"])
def test_it_holds_for_batches_threads_layouts_modes_and_repeated_calls(name):
    static, dynamic = static_and_dynamic(name)
    size = 32 if "cifar" in name else 64
    assert differing(static, dynamic, SOME_BATCHES, size, modes=MODES) == []
    found = [finding for stage in graph_stages(dynamic).values() for finding in chunking._known.get(stage, {}).values()]
    assert any(finding.is_exact for finding in found)


@pytest.mark.parametrize("name", ["dg_cifar_resnet20", pytest.param("dg_mobilenetv2_050", marks=pytest.mark.slow)])
def test_it_holds_on_two_threads(name):
    static, dynamic = static_and_dynamic(name)
    size = 32 if "cifar" in name else 64
    assert differing(static, dynamic, (8, 16, 17, 33), size, number_of_threads=(2,), calls=2) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_it_holds_for_every_family(name):
    static, dynamic = static_and_dynamic(name)
    assert differing(static, dynamic, (1, 3, 16, 17), modes=MODES) == []


def test_it_would_not_hold_if_every_batch_ran_in_chunks(monkeypatch):
    """The tests above would be empty otherwise."""
    static, dynamic = static_and_dynamic("dg_tf_efficientnet_lite0")
    monkeypatch.setattr(chunking, "is_exact", lambda *args: True)
    found = differing(static, dynamic, (16, 17))
    if not found:
        pytest.skip("on this processor, torch convolves a batch as it convolves its parts")
    assert any("contiguous_format" in layout for _, layout, *_ in found)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ZOO)
def test_it_holds_for_the_zoo_and_every_batch(name):
    static, dynamic = static_and_dynamic(name)
    size = 32 if "cifar" in name else 64
    assert differing(static, dynamic, range(1, 65), size, number_of_threads=(1, 2)) == []
    assert differing(static, dynamic, SOME_BATCHES, size, modes=MODES, calls=1) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_holds_at_full_size(name):
    static, dynamic = static_and_dynamic(name)
    assert differing(static, dynamic, (2, 8, 16, 32), 224, number_of_threads=(1, 2)) == []


@pytest.mark.slow  # families are in the tests above
@pytest.mark.parametrize("name", ZOO)
def test_it_holds_for_the_zoo(name):
    static, dynamic = static_and_dynamic(name)
    x = torch.randn(2, 3, 96, 80)
    with torch.no_grad():
        assert torch.equal(dynamic(x), static(x))


@pytest.mark.parametrize("name", OTHERS)
def test_it_holds_for_any_timm_model(name):
    static = randomize(timm.create_model(name))
    dynamic = dg_timm.dynamize(copy.deepcopy(static))
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(dynamic(x), static(x))
        assert set(static.state_dict()) < set(dynamic.state_dict())
        assert isinstance(dynamic, type(static))
        alphas = dg_timm.adjacency(dynamic, x)
    assert list(alphas) == list(graph_stages(dynamic))
    for alpha in alphas.values():  # the chain, and nothing else
        assert torch.equal(alpha[0], torch.ones(len(alpha[0]) - 1).diag(1))


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_holds_in_train_mode(name, memory_format):
    static, dynamic = (m.to(memory_format=memory_format).train() for m in static_and_dynamic(name, drop_path_rate=0.0))
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=memory_format)
    assert torch.equal(dynamic(x), static(x))
    for key, value in static.state_dict().items():
        assert torch.equal(dynamic.state_dict()[key], value), key  # BatchNorm has seen the same batch, once


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["dg_resnet18", "dg_mobilenetv2_050"])
def test_it_holds_in_other_types(name, dtype):
    static, dynamic = (m.to(dtype) for m in static_and_dynamic(name))
    with torch.no_grad():
        for batch in (1, 4):
            x = torch.randn(batch, 3, 64, 64, dtype=dtype)
            assert torch.equal(dynamic(x), static(x))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("feature_cls", [None, "dict", "hook", "getter", "fx"])
def test_it_holds_in_features_only(name, feature_cls):
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
def test_it_holds_for_a_feature_extractor_that_is_converted_itself(name, feature_cls):
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


def test_frozen_batch_norm_modules_convert_too():
    static = timm.utils.model.freeze_batch_norm_2d(randomize(timm.create_model("mobilenetv2_050")))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = static(x)
        assert torch.equal(dg_timm.dynamize(static)(x), wanted)
