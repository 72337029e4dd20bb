"""Whole networks, compiled and exported: one graph without a break, which predicts what eager mode does."""

import copy
import threading
import warnings

import pytest
import timm
import torch

import dg_timm
from dg_timm.graph.context import requesting
from tests.helpers.networks import FAMILIES, randomize, randomize_graph

SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("dg_mobilenetv2_050", "dg_regnety_002")]


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()


def trained(name):
    return randomize(randomize_graph(timm.create_model(name, num_classes=3)))


def compiled(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        made = torch.compile(model, fullgraph=True, **options)
        made(torch.randn(2, 3, 64, 64))
    return made


@pytest.mark.parametrize("name", ["dg_regnetx_002", *SLOWER])
def test_a_network_is_one_graph_of_the_reference_formulas(name):
    """They are fused by the compiler; nothing of eager mode is called."""
    model, x = trained(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        explained = torch._dynamo.explain(model)(x)
        assert explained.graph_count == 1
        assert not any("dg_timm" in str(node.target) for graph in explained.graphs for node in graph.graph.nodes
                       if node.op == "call_function")  # fmt: skip
        torch.testing.assert_close(compiled(model, backend="eager")(x), wanted, rtol=1e-4, atol=1e-4)


def test_what_is_set_later_is_compiled_anew():
    """Another threshold, another execution, and back: never the graph of the last setting."""
    model, x = trained("dg_cifar_resnet20"), torch.randn(2, 3, 32, 32)
    made = torch.compile(model, backend="eager", fullgraph=True)
    chain = {name: torch.ones(len(stage) + 1).diag(1).bool()
             for name, stage in dg_timm.graph.stage.graph_stages(model).items()}  # fmt: skip

    def check():
        torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-4)
        return model(x)

    with torch.no_grad():
        found = [check()]
        dg_timm.set_threshold(model, 0.5)
        found.append(check())
        dg_timm.set_execution(model, "fixed", chain)
        found.append(check())
        dg_timm.set_execution(model, "dense")
        dg_timm.set_threshold(model, None)
        assert torch.equal(check(), found[0])
    assert not any(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("name", ["dg_resnet18", *SLOWER])
def test_an_exported_network_takes_any_batch(name):
    model = trained(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for size in (1, 5):
            x = torch.randn(size, 3, 64, 64)
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_by_inductor_it_trains_and_predicts(name):
    model, x = trained(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-3, atol=1e-3)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled(model)(x).square().sum(), list(model.parameters()))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-2, atol=1e-2 * w.abs().max().item() + 1e-6)


def test_a_compiled_network_is_looked_at_and_counted():
    """Wrapped as a whole, a block alone, or in place: what runs is the original."""
    model, x = randomize_graph(timm.create_model("dg_cifar_resnet20").eval()), torch.randn(2, 3, 32, 32)
    wanted, cost = dg_timm.adjacency(model, x), dg_timm.cost(model, x)
    in_place, of_a_block = copy.deepcopy(model), copy.deepcopy(model)
    in_place.compile(backend="eager")
    of_a_block.layer1[1] = torch.compile(of_a_block.layer1[1], backend="eager")
    for compiled in (torch.compile(model, backend="eager"), in_place, of_a_block):
        torch.testing.assert_close(dg_timm.cost(compiled, x), cost)
        found = dg_timm.adjacency(compiled, x).values()
        assert all(torch.allclose(alpha, own) for alpha, own in zip(found, wanted.values(), strict=True))
        assert dg_timm.complexity(compiled, (3, 32, 32)) == dg_timm.complexity(model, (3, 32, 32))


def test_it_predicts_while_another_thread_asks():
    """A request of a thread is guarded, and seen by that thread alone."""
    torch._dynamo.reset()
    model, x = randomize_graph(timm.create_model("dg_cifar_resnet20").eval()), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(x)
        compiled, entered, over = torch.compile(model, backend="eager"), threading.Event(), threading.Event()

        def ask():
            with requesting(threshold=9.0):
                entered.set()
                over.wait(60)

        torch.testing.assert_close(compiled(x), wanted)
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            assert entered.wait(60)
            torch.testing.assert_close(compiled(x), wanted)
        finally:
            over.set()
            asking.join()
        torch.testing.assert_close(compiled(x), wanted)
        with requesting(threshold=9.0):  # its own is heeded
            assert not torch.allclose(compiled(x), wanted)
