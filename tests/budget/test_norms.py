"""Norms fitted anew to the edges that are open, and nothing else."""

import pytest
import timm
import torch

import dg_timm
from dg_timm.budget.norms import refit_norms
from dg_timm.graph.stage import graph_stages
from tests.helpers.networks import randomize, randomize_graph

SIZE = (3, 64, 64)


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_norms_are_refitted_for_the_thresholds_in_force(execution):
    """Over one batch in eval mode the refitted network gives what batch statistics give, and nothing else changes."""
    torch.manual_seed(0)
    model = randomize_graph(timm.create_model("dg_regnetx_002", num_classes=3).eval(), spread=3.0)
    dg_timm.set_threshold(model, 0.3)
    dg_timm.set_execution(model, execution)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = 3 * torch.randn(8, *SIZE)
    stem = model.stem.bn
    refit_norms(model, [images[:4], images[4:]])
    maps = model.stem.conv(images)
    assert torch.allclose(stem.running_mean, maps.mean((0, 2, 3)), atol=1e-5)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert not any(module.training for module in model.modules())
    assert all(norm.momentum == 0.1 for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d))
    assert {stage.execution for stage in graph_stages(model).values()} == {execution}
    after = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="no images"):
        refit_norms(model, [])
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bad", [[torch.zeros(2, 5, 32, 32)], [torch.full((2, 3, 32, 32), float("nan"))], []])
def test_refitting_that_fails_leaves_the_model_as_it_was(bad):
    model = randomize(timm.create_model("dg_cifar_resnet20"))
    before = {name: own.clone() for name, own in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)):
        refit_norms(model, bad)
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    assert not any(module.training for module in model.modules())
