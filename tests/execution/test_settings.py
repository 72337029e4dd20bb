"""What a user sets on a model: its threshold. (How it runs has files of its own.)"""

import math

import pytest
import timm
import torch

import dg_timm
from dg_timm.graph.stage import routers
from tests.helpers.networks import randomize, randomize_graph


@pytest.fixture
def model():
    return randomize_graph(randomize(timm.create_model("dg_regnetx_002", num_classes=3)))


def test_a_higher_threshold_closes_more_and_none_returns_to_the_learned_one(model):
    x = torch.randn(2, 3, 64, 64)
    learned = model(x)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    open_edges = []
    for threshold in (0, 0.1, 0.3, 1.0, 100):
        dg_timm.set_threshold(model, threshold)
        alpha = dg_timm.adjacency(model, x)
        open_edges.append(sum(int((a != 0).sum()) for a in alpha.values()))
        assert all(((a == 0) | (a.abs() >= threshold)).all() for a in alpha.values())
    assert open_edges == sorted(open_edges, reverse=True)
    assert open_edges[0] > open_edges[2] > open_edges[-1] == 0
    assert not torch.equal(model(x), learned)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    dg_timm.set_threshold(model, None)
    assert torch.equal(model(x), learned)


@pytest.mark.parametrize(
    ("bad", "error"),
    [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("0.1", TypeError), (True, TypeError)],
)
def test_bad_thresholds_change_nothing(model, bad, error):
    dg_timm.set_threshold(model, 0.25)
    with pytest.raises(error, match="threshold must be"):
        dg_timm.set_threshold(model, bad)
    assert all(router.fixed_threshold == 0.25 for router in routers(model).values())
    with pytest.raises(ValueError, match="static network"):
        dg_timm.set_threshold(timm.create_model("resnet18"), 0.1)
