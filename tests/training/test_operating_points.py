"""One network at many thresholds: the curve, the point that meets a budget, and the network that is saved there."""

import argparse
import re

import pytest
import timm
import torch

import dg_timm
from dg_timm._errors import BadValue
from dg_timm.graph.stage import routers
from dg_timm.training.data.images import Batch
from dg_timm.training.run import operating_points
from dg_timm.training.run.timing import time_ratios
from tests.helpers.networks import randomize_graph


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomize_graph(timm.create_model("dg_cifar_resnet20", num_classes=3)).eval()


@pytest.fixture
def batch():
    mask = torch.ones(32)
    mask[30:] = 0
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 16, 16, generator=generator)
    labels = torch.randint(3, (32,), generator=generator)
    return Batch(images, labels, mask, torch.zeros(32, 2), [], [])


def test_thresholds_go_from_nothing_closed_to_nearly_all(model, batch):
    before = [router.threshold.clone() for router in routers(model).values()]
    chosen = operating_points.thresholds_of(model, batch.images, 4)
    assert chosen[0] == 0.0
    assert chosen == sorted(chosen)
    assert len(chosen) == 4
    assert all(router.fixed_threshold is None for router in routers(model).values())
    assert all(torch.equal(a, r.threshold) for a, r in zip(before, routers(model).values(), strict=True))
    dg_timm.set_threshold(model, chosen[-1])
    weights = torch.cat([alpha[alpha != 0] for alpha in dg_timm.adjacency(model, batch.images).values()])
    dg_timm.set_threshold(model, 0.0)
    whole = torch.cat([alpha[alpha != 0] for alpha in dg_timm.adjacency(model, batch.images).values()])
    assert 0 < len(weights) < 0.2 * len(whole)


def test_top1_and_cost_are_those_of_the_images_that_count(model, batch):
    top1, costs = operating_points.predict(model, [batch])
    kept = batch.images[:30]
    assert top1 == pytest.approx(100 * (model(kept).argmax(1) == batch.labels[:30]).double().mean().item())
    assert torch.allclose(costs, dg_timm.cost(model, kept), atol=1e-6)
    static = operating_points.make_static(model)
    assert operating_points.predict(static, [batch])[1].tolist() == [1.0] * 30


def test_every_threshold_has_norms_of_its_own(model, batch):
    points = operating_points.at_thresholds(model, [0.0, 0.5], [batch.images])
    assert list(points) == ["learned", "0.0", "0.5"]
    assert points["learned"] is model
    states = [point.state_dict() for point in points.values()]
    moved = [key for key in states[0] if "running_mean" in key and not torch.equal(states[0][key], states[2][key])]
    assert moved
    weights = [key for key in states[0] if key.endswith(".weight")]
    assert all(torch.equal(states[0][key], states[2][key]) for key in weights)
    plain = operating_points.at_thresholds(model, [0.5], [])["0.5"].state_dict()
    assert all(torch.equal(plain[key], states[0][key]) for key in plain)


def test_a_batch_that_is_too_large_to_be_timed(model, batch):
    with pytest.raises(BadValue, match="a batch of 999 can't be timed with 32 images"):
        operating_points.measure_curve({"learned": model}, model, [batch], time_batch=[999], rounds=2)


def test_the_best_point_is_the_most_accurate_within_the_budget():
    rows = [{"top1": 90.0, "cost": 0.9, "time_1": 0.5}, {"top1": 88.0, "cost": 0.5, "time_1": 0.6}]
    assert operating_points.best_within(rows, 1.0, ["cost"]) is rows[0]
    assert operating_points.best_within(rows, 0.6, ["cost", "time_1"]) is rows[1]
    with pytest.raises(BadValue, match=r"no threshold of the curve keeps to 0\.4; the least is 0\.6"):
        operating_points.best_within(rows, 0.4, ["cost", "time_1"])


def test_the_saved_network_has_the_threshold_that_was_in_force(model, batch, tmp_path):
    point = operating_points.at_thresholds(model, [0.5], [batch.images])["0.5"]
    dg_timm.set_execution(point, "dense")
    expected = point(batch.images)
    operating_points.save_at(point, tmp_path / "net", {"Threshold": "0.5"})
    again = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    assert torch.allclose(again(batch.images), expected, atol=1e-5)
    assert all(router.fixed_threshold is None for router in routers(again).values())
    assert re.search(r"Threshold\W+0\.5", (tmp_path / "net" / "README.md").read_text(encoding="utf-8"))


def test_data_of_other_classes_is_refused(model):
    parser = argparse.ArgumentParser()
    operating_points.add_options(parser)
    args = argparse.Namespace(**vars(parser.parse_args(["--data", "digits"])), model="net")
    with pytest.raises(BadValue, match="net has 3 classes, digits has 10"):
        operating_points.load_batches(args, model)


def test_contestants_take_turns():
    order = []
    names = {name: (lambda images, name=name: order.append(name)) for name in ("static", "a", "b")}
    found = time_ratios(names["static"], [names["a"], names["b"]], torch.zeros(4, 1), batch_size=4, rounds=2)
    assert order == ["static", "a", "b", *("static", "a", "b"), *("b", "a", "static")]
    assert len(found) == 2
    assert all(timing.low <= timing.ratio <= timing.high for timing in found)
