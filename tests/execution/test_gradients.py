"""Gradients of a stage that share memory traffic, against plain autograd over the reference formulas."""

import pytest
import timm
import torch

from dg_timm.execution import operators
from tests.helpers.maps import LAYOUTS
from tests.helpers.networks import randomize_graph
from tests.helpers.stages import images, make_stage


@pytest.fixture(params=["kernels", "torch"])
def backend(request):
    with operators.using_backend(request.param):
        yield request.param


def gradients(made, x, **options):
    wanted = [x, *made.parameters()]
    return torch.autograd.grad(made(x).square().sum(), wanted, allow_unused=True, **options)


def check_gradients(made, x, learning):
    found = torch.autograd.grad(made(x).square().sum(), learning)
    with operators.using_backend("reference"):
        wanted = torch.autograd.grad(made(x).square().sum(), learning)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_double_backward_is_right(backend, kind):
    made, x = make_stage(kind, 3), images(kind, batch=2).requires_grad_()

    def second():
        first = gradients(made, x, create_graph=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        return torch.autograd.grad(penalty, [x, *made.parameters()], allow_unused=True)

    found = second()
    with operators.using_backend("reference"):
        wanted = second()
    assert sum(g is not None for g in found) > 10
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-8, atol=1e-8)


def test_backward_twice_and_in_part(backend):
    made, x = make_stage("shortcut", 4), images("shortcut").requires_grad_()
    with operators.using_backend("reference"):
        wanted = gradients(made, x)
    loss = made(x).square().sum()
    (only,) = torch.autograd.grad(loss, [made.router2.fc.weight], retain_graph=True)
    names = [name for name, _ in made.named_parameters()]
    torch.testing.assert_close(only, wanted[1 + names.index("router2.fc.weight")], rtol=1e-9, atol=1e-9)
    for keep in (True, False):
        again = torch.autograd.grad(loss, [x, *made.parameters()], allow_unused=True, retain_graph=keep)
        for f, w in zip(again, wanted, strict=True):
            torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", ["blocks", "graph"])
def test_frozen_parts(backend, frozen):
    made, x = make_stage("projection", 3), images("projection")
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.startswith(("router", "projection")) == (frozen == "blocks"))
    check_gradients(made, x, [p for p in made.parameters() if p.requires_grad])


def test_forward_mode_and_batched_derivatives_are_right():
    made, x = make_stage("shortcut", 3), images("shortcut", batch=2).requires_grad_()
    out = made(x)
    tangent, cotangents = torch.randn_like(x), torch.randn(2, *out.shape, dtype=x.dtype)
    (batched,) = torch.autograd.grad(out, x, cotangents, is_grads_batched=True, retain_graph=True)
    for got, cotangent in zip(batched, cotangents, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(out, x, cotangent, retain_graph=True)[0])
    with torch.autograd.forward_ad.dual_level():
        dual = made(torch.autograd.forward_ad.make_dual(x.detach(), tangent))
        along = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close((along * cotangents[0]).sum(), (batched[0] * tangent).sum())
    torch.testing.assert_close(torch.func.jvp(made, (x.detach(),), (tangent,))[1], along)


def test_blocks_that_change_their_input_in_place_get_right_gradients():
    made, x = make_stage("input", 3), images("input")
    for name in made.block_names:
        block = made.get_submodule(name)
        block.conv1 = torch.nn.Sequential(torch.nn.ReLU(inplace=True), block.conv1)
    learning = [made.get_submodule(name).conv1[1].weight for name in made.block_names]
    check_gradients(made, x, learning)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dg_resnet18", "dg_mobilenetv2_050", "dg_regnety_002"])
def test_networks_train_as_by_the_reference(name, layout):
    model = (
        randomize_graph(timm.create_model(name, num_classes=5), spread=0.5).double().to(memory_format=layout).train()
    )
    x, start = torch.randn(4, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=layout), model.state_dict()
    start = {key: value.clone() for key, value in start.items()}
    found = {}
    for way in ("kernels", "torch", "reference"):
        model.load_state_dict(start)
        model.zero_grad()
        with operators.using_backend(way):
            model(x).square().mean().backward()
        found[way] = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    for way in ("kernels", "torch"):
        for key, wanted in found["reference"].items():
            torch.testing.assert_close(found[way][key], wanted, rtol=1e-6, atol=1e-9, msg=f"{way} {key}")
