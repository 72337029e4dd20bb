"""A batch that runs in chunks predicts what it does as a whole, to the bit, or is not chunked; who watches sees all."""

import copy
import gc
import threading

import pytest
import timm
import torch
from torch import nn

import dg_timm
from dg_timm.execution import chunking, operators
from dg_timm.graph.context import requesting
from dg_timm.graph.gate import gates
from dg_timm.graph.stage import graph_stages
from tests.helpers.maps import LAYOUTS
from tests.helpers.networks import randomize, randomize_graph, static_and_dynamic


@pytest.fixture(autouse=True)
def _small_caches(monkeypatch):
    """Small networks are chunked, too."""
    monkeypatch.setattr(chunking, "CHUNK_BYTES_PER_THREAD", 2**16)


def count_images(model):
    """How many images block 1 of the first stage gets in each call; by no hook, which would forbid chunks."""
    block, calls = next(iter(graph_stages(model).values()))[0], []

    class Counting(type(block)):
        def forward(self, *args):
            calls.append(len(args[0]))
            return super().forward(*args)

    Counting.__module__ = type(block).__module__  # of a module of the user's nothing is found out
    block.__class__ = Counting
    return calls


def identity(name):
    """A conversion, whose bits are the static network's."""
    return static_and_dynamic(name)[1]


def warmed_up(model, x):
    """A model that has seen the shape twice."""
    model(x), model(x)
    return model


class Centre(nn.Module):
    """Depends on the batch as a whole, as a user's module may."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_what_is_put_into_a_block_later_sees_the_whole_batch():
    static, model = static_and_dynamic("dg_resnet18")
    x, blocks = torch.randn(8, 3, 64, 64), [m.layer1[1] for m in (static, model)]
    calls = count_images(model)
    with torch.no_grad():
        warmed_up(model, x)
        calls.clear()
        assert torch.equal(model(x), static(x))
        assert len(calls) > 1
        for block in blocks:
            block.drop_block = Centre()
        assert torch.equal(model(x), static(x))
        for block in blocks:
            block.drop_block = nn.Identity()
            block.act2.forward = lambda x: torch.relu(x - x.mean(0, keepdim=True))
        for _ in range(3):
            assert torch.equal(model(x), static(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dg_resnet18", "dg_mobilenetv2_050", "dg_regnetx_002"])
def test_chunks_of_a_batch_predict_what_the_batch_does_to_the_bit(name, layout):
    static, model = (m.to(memory_format=layout) for m in static_and_dynamic(name))
    x = torch.randn(7, 3, 64, 64).contiguous(memory_format=layout)
    calls = count_images(model)
    with torch.no_grad():
        wanted = static(x)
        for _ in range(2):
            assert torch.equal(model(x), wanted)
        calls.clear()
        assert torch.equal(model(x), wanted)
        assert len(calls) > 1
        assert sum(calls) == 7
        assert min(calls) >= chunking.MIN_IMAGES
        randomize_graph(model)
        with operators.using_backend("reference"):
            wanted = model(x)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [7, 8, 16])
@pytest.mark.parametrize("gated", [False, True])
def test_a_trained_network_is_chunked_from_the_first_call_on(batch, gated):
    """Nobody has its bits from elsewhere; every call gives the same ones."""
    model = randomize_graph(timm.create_model("dg_resnet18", gates=gated)).eval()
    for gate in gates(model).values():
        nn.init.normal_(gate.fc.weight, std=3.0)
    x, calls = torch.randn(batch, 3, 64, 64), count_images(model)
    with torch.no_grad():
        wanted = model(x)
        assert len(calls) > 1
        assert torch.equal(model(x), wanted)
        with operators.using_backend("reference"):
            torch.testing.assert_close(wanted, model(x), rtol=1e-4, atol=1e-4)
        model.layer1[0].act2 = DependsOnTheBatch().eval()  # of a module of the user's nothing is known
        calls.clear()
        model(x)
    assert calls == [batch]


def test_a_network_that_becomes_the_identity_promises_its_bits_again():
    static, model = static_and_dynamic("dg_resnet18")
    x, calls = torch.randn(8, 3, 64, 64), count_images(model)
    with torch.no_grad():
        randomize_graph(model)
        model(x)
        assert len(calls) > 1
        calls.clear()
        model.load_state_dict(static.state_dict())
        assert torch.equal(model(x), static(x))
    assert calls == [8]


def test_a_router_without_a_bias_is_called():
    model, x = randomize_graph(identity("dg_resnet18")), torch.randn(8, 3, 64, 64)
    model.layer1.router0.fc.bias = None
    with torch.no_grad(), operators.using_backend("reference"):
        wanted = model(x)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


def test_the_first_call_of_a_shape_costs_nothing_and_the_second_finds_out():
    model, x = identity("dg_resnet18"), torch.randn(8, 3, 64, 64)
    calls, seen = count_images(model), []
    with torch.no_grad():
        for _ in range(4):
            calls.clear()
            model(x)
            seen.append(list(calls))
        calls.clear()
        model(x[:6])  # another shape
        seen.append(list(calls))
    chunks = seen[3]
    assert len(chunks) > 1
    assert seen == [[8], [8, *chunks, *chunks], chunks, chunks, [6]]


@pytest.mark.parametrize("size", [32, 64])
def test_what_weights_hide_is_found_out(size):
    """In a new ResNet every block's last norm is 0; how its convolutions round shows with other weights alone."""
    static = randomize(timm.create_model("resnet26", num_classes=5))
    model = dg_timm.dynamize(timm.create_model("resnet26", num_classes=5).eval())
    x = torch.randn(16, 3, size, size)
    with torch.inference_mode():
        warmed_up(model, x)
        assert chunking._known
        model.load_state_dict(static.state_dict())
        for _ in range(3):
            assert torch.equal(model(x), static(x))


class DependsOnTheBatch(nn.Module):
    """As an algorithm of a convolution that another size of batch takes."""

    def forward(self, x):
        return x + 1e-5 * len(x)


def test_a_stage_whose_chunks_round_otherwise_is_not_chunked(monkeypatch):
    model, x = identity("dg_resnet18"), torch.randn(8, 3, 64, 64)
    model.layer1[0].act2 = DependsOnTheBatch().eval()
    calls = count_images(model)
    with torch.no_grad():
        wanted = model(x)
        for _ in range(3):
            calls.clear()
            assert torch.equal(model(x), wanted)
        assert calls == [8]
        monkeypatch.setattr(chunking, "is_exact", lambda *args: True)
        assert not torch.equal(model(x), wanted)


def test_what_is_known_belongs_to_the_setting():
    """Another layout, type or number of threads is found out anew; a copy knows nothing."""
    model, x = identity("dg_resnet18"), torch.randn(8, 3, 64, 64)
    calls, threads = count_images(model), torch.get_num_threads()

    def is_known(model, x):
        calls.clear()
        with torch.no_grad():
            model(x)
        return calls != [8]

    with torch.no_grad():
        warmed_up(model, x)
    assert is_known(model, x)
    assert not is_known(copy.deepcopy(model), x)
    assert not is_known(model, x.contiguous(memory_format=torch.channels_last))
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert not is_known(model, x)
    finally:
        torch.set_num_threads(threads)
    assert is_known(model, x)
    torch.backends.mkldnn.enabled = False
    try:
        assert not is_known(model, x)
    finally:
        torch.backends.mkldnn.enabled = True
    assert not is_known(model.double(), x.double())


class Observing(nn.Module):
    """Keeps the largest value that it has seen, as observers of quantization do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        self.largest.copy_(torch.maximum(self.largest, x.abs().amax()))
        return x


def test_a_module_of_the_users_sees_images_alone():
    model, x = identity("dg_mobilenetv2_100"), 0.01 * torch.randn(16, 3, 96, 96)
    model.blocks[1][0].bn1 = nn.Sequential(model.blocks[1][0].bn1, Observing())
    observing = model.blocks[1][0].bn1[1]
    with torch.no_grad():
        model(x)
        once = observing.largest.clone()
        model(x), model(x)
    assert torch.equal(observing.largest, once)


def test_finding_out_draws_no_number_of_the_users_and_keeps_no_stage_alive(monkeypatch):
    monkeypatch.setattr(chunking, "_MAX_SETTINGS", 3)
    model = identity("dg_cifar_resnet20")
    state = torch.get_rng_state()
    with torch.no_grad():
        for size in range(8, 16):
            warmed_up(model, torch.zeros(size, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    stages = list(graph_stages(model).values())
    assert all(len(chunking._known[stage]) == 3 for stage in stages)
    gc.collect()  # of other tests
    before = len(chunking._known)
    del stages, model
    gc.collect()
    assert len(chunking._known) == before - 3


def test_who_watches_a_stage_sees_the_whole_batch():
    model = identity("dg_resnet18")
    x, seen = torch.randn(8, 3, 64, 64), []
    calls = count_images(model)

    def sizes():
        calls.clear()
        model(x)
        return list(calls)

    with torch.no_grad():
        warmed_up(model, x)
        assert len(sizes()) > 1
        handle = model.layer1[1].register_forward_hook(lambda module, args, out: seen.append(len(out)))
        assert sizes() == [8]
        handle.remove()
        assert seen == [8]
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
        assert sizes() == [8]
        handle.remove()
        with dg_timm.record_adjacency(model) as recorded:
            assert sizes() == [8]
        assert recorded["layer1"].shape[0] == 8
        assert dg_timm.adjacency(model, x)["layer1"].shape[0] == 8
        with requesting(gates={}):
            assert sizes() == [8]
        assert len(sizes()) > 1
    assert sizes() == [8]  # with gradients


def test_norms_that_look_at_the_batch_get_the_whole_batch():
    model, x = identity("dg_resnet18"), torch.randn(8, 3, 64, 64)
    calls = count_images(model)
    with torch.no_grad():
        warmed_up(model, x)
        norm = model.layer1[0].bn1
        norm.train()
        for _ in range(2):
            calls.clear()
            for _ in range(3):
                model(x)
            assert calls == [8] * 3
            norm.eval().running_mean = norm.running_var = None  # it takes the batch's in eval mode, too


def test_squeeze_and_excitation_is_not_chunked():
    """Its layers see maps of one pixel, whose rounding depends on the size of the batch."""
    for name, chunked in (("dg_regnety_002", False), ("dg_regnetx_002", True)):
        model, x = identity(name), torch.randn(8, 3, 64, 64)
        calls = count_images(model)
        with torch.no_grad():
            warmed_up(model, x)
            calls.clear()
            model(x)
        assert (len(calls) > 1) == chunked


def test_sparse_execution_runs_in_chunks_and_predicts_the_same():
    model, x = randomize_graph(identity("dg_resnet18")), torch.randn(8, 3, 64, 64)
    calls = count_images(model)
    with torch.no_grad():
        wanted = model(x)
        dg_timm.set_execution(model, "sparse")
        calls.clear()
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert len(calls) != 1 or calls[0] < 8


def test_threads_find_out_together():
    static, model = static_and_dynamic("dg_cifar_resnet20")
    images = [torch.randn(batch, 3, 32, 32) for batch in (6, 8, 10, 12)]
    with torch.no_grad():
        wanted = [static(x) for x in images]
    wrong = []

    def predict(first):
        with torch.no_grad():
            for turn in range(16):
                k = (first + turn) % len(images)
                if not torch.equal(model(images[k]), wanted[k]):
                    wrong.append((first, turn))

    threads = [threading.Thread(target=predict, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
