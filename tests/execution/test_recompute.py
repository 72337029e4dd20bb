"""A block's input is computed again in the backward pass; what changed since, and other hooks, are respected."""

import gc

import pytest
import torch

from dg_timm.execution import autograd, operators, recompute
from tests.helpers.stages import images, make_stage


def test_the_inputs_of_blocks_are_not_kept(monkeypatch):
    """A node's input is gathered again in the backward pass: as often as there are blocks, and not kept before."""
    made, x = make_stage("input", 5, dtype=torch.float32), images("input", dtype=torch.float32)
    gathered, alive = [], []

    def count(sources, weights):
        z = original(sources, weights)
        gathered.append(z.shape)
        alive.append(z.untyped_storage()._weak_ref())
        return z

    original = operators.weighted_sum
    monkeypatch.setattr(autograd, "weighted_sum", count)
    monkeypatch.setattr(recompute, "weighted_sum", count)
    out = made(x)
    forward = len(gathered)
    gc.collect()
    kept = sum(not torch.UntypedStorage._expired(ref) for ref in alive)
    assert forward == 6  # five blocks and the output
    assert kept == 1  # the output alone
    out.sum().backward()
    assert len(gathered) == forward + 5


def test_changing_the_input_of_a_frozen_graph_before_backward_is_an_error():
    made, x = make_stage("input", 3), images("input")
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not name.startswith("router"))
    loss = made(x).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_a_feature_in_place_before_backward_is_an_error():
    made, x = make_stage("input", 3), images("input").requires_grad_()
    features = []
    made.get_submodule("1").register_forward_hook(lambda module, args, out: features.append(out))
    loss = made(x).sum()
    with torch.no_grad():
        features[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_on_saved_tensors_have_their_way():
    made, x = make_stage("input", 3), images("input")
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        out = made(x)
    assert packed.count(x.shape) > 5
    out.sum().backward()


def test_training_where_saved_tensors_may_have_no_hooks():
    stage, x = make_stage("input", 3), images("input")
    out = stage(x)
    wanted = torch.autograd.grad(out.sum(), list(stage.parameters()))
    with torch.autograd.graph.disable_saved_tensors_hooks("none, please"):
        got = torch.autograd.grad(stage(x).sum(), list(stage.parameters()))
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
