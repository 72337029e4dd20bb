"""Networks at their operating points, and the card of the one that ships."""

import argparse
import re

import pytest
import timm
import torch
from matplotlib.axes import Axes

from dg_timm._errors import BadState
from dg_timm.experiments import ship
from dg_timm.experiments.curves import DEEPEST, DYNAMIC, curves_table, draw_curves, measure_networks, without_last
from dg_timm.experiments.trial import Result, Trial
from tests.helpers.networks import randomize
from tests.helpers.scripts import ROOT, rows

TIMES = {f"time_{size}{column}": 0.5 for size in (1, 32) for column in ("", "_low", "_high")}


def test_the_last_blocks_of_every_stage_are_taken_off():
    model = randomize(timm.create_model(DEEPEST))
    images = torch.randn(2, 3, 32, 32)
    lengths = [len(model.get_submodule(f"layer{k}")) for k in (1, 2, 3)]
    with torch.no_grad():
        whole = model(images)
        assert torch.equal(without_last(model, 0)(images), whole)
        assert not torch.equal(without_last(model, 2)(images), whole)
    assert [len(model.get_submodule(f"layer{k}")) for k in (1, 2, 3)] == [length - 2 for length in lengths]


def test_a_network_that_was_deleted_is_named(tmp_path):
    result = Result(Trial("gone"), {}, 1.0, "cores", tmp_path / "gone")
    small = Result(Trial("gone-16px"), {}, 1.0, "cores", tmp_path / "gone")
    args = argparse.Namespace(output=tmp_path)
    with pytest.raises(BadState, match=r"networks are not in .*: gone; run without --collect"):
        measure_networks([result, small], args)


def test_the_table_tells_how_long_trainings_took_on_each_machine(tmp_path):
    row = {"network": DEEPEST, "point": "", "top1": "", "refitted": 80.0, "cost": 1.0, "spread": 0.0, **TIMES}
    results = [Result(Trial(str(k)), {}, 90.0, on, tmp_path) for k, on in enumerate(("a", "a", "b"))]
    text = curves_table([row], results)
    assert f"| {DEEPEST} |  |  | 80.0 | 1.000 | 0.000 | 0.50 (0.50 to 0.50) | 0.50 (0.50 to 0.50) |" in text
    assert "Training took 3 minutes (a), 2 minutes (b) over all trials; measured on " in text


def test_points_of_networks_that_collapsed_are_not_drawn(tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, *more, **options: drawn.extend(y) or plot(self, x, y, *more, **options)
    )
    row = {"network": f"{DYNAMIC}-0.5", "cost": 0.5, **TIMES}
    draw_curves([{**row, "point": "learned", "refitted": 80.0}, {**row, "point": "3.0", "refitted": 20.0}],
                tmp_path / "x.png")  # fmt: skip
    assert drawn == [80.0] * 3


def test_the_card_of_the_network_that_ships_has_the_figures_of_the_table(tmp_path):
    times = ROOT / "results" / "experiments" / "budgets_full" / "times.csv"
    name = f"{DYNAMIC}-0.6-distilled"
    own, static = ship.read_times(times, name, f"{DEEPEST}-longer")
    trial = Trial(name, {"recipe": "cifar10_32px"}, 0, {"distill": Trial(DEEPEST)})
    result = Result(trial, {"epoch": 4.0}, 600.0, "some cores", tmp_path)
    card = ship.make_card(own, static, [result], argparse.Namespace(target_cost=0.6, seed=0))
    assert card.accuracies[0].value == float(own["top1"])
    assert card.accuracies[0].static == float(static["top1"])
    assert [measured.batch_size for measured in card.times] == [1, 32]
    assert card.times[1].ratio == float(own["time_32"])
    assert card.times[1].static_ms == float(own["time_32_static_ms"])
    assert card.made["Training"].endswith(
        f"4 epochs of the recipe `cifar10_32px`, learning also the logits of {DEEPEST}"
    )
    assert card.made["Hardware"] == "some cores, 10 minutes"
    percent = round(100 * float(next(row for row in rows(times) if row["network"] == name)["cost"]))
    assert re.search(rf"an image takes {percent} % of", card.summary)


def test_a_table_without_the_network_is_named(tmp_path):
    with pytest.raises(BadState, match=r"times\.csv has no row of a or b; run budgets\.py"):
        ship.read_times(tmp_path / "times.csv", "a", "b")
