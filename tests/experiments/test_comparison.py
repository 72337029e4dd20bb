"""The table over seeds."""

import math

import pytest
from matplotlib.axes import Axes
from scipy import stats

from dg_timm.experiments.comparison import comparison_table, draw_differences, paired_difference, write_comparison
from dg_timm.experiments.trial import Result, Trial
from tests.helpers.scripts import rows

TITLES = {"static": "static", "alpha": "learned", "dead": "collapsed", "none": "not run"}


@pytest.fixture
def results(tmp_path):
    top1 = {"static": (70.0, 71.0, 72.0), "alpha": (71.0, 71.5, 73.5), "dead": (10.0, 12.0)}
    return [
        Result(Trial(name, {}, seed), {"eval_top1": value}, 60.0, "two cores", tmp_path)
        for name, values in top1.items()
        for seed, value in enumerate(values)
    ]


def test_paired_differences_have_students_interval():
    values, base = {0: 1.0, 1: 3.0, 2: 2.0, 7: 9.0}, {0: 0.0, 1: 1.0, 2: 2.0}
    mean, low, high, n = paired_difference(values, base)
    expected = stats.t.interval(0.95, 2, loc=1.0, scale=stats.sem([1.0, 2.0, 0.0]))
    assert (mean, n) == (1.0, 3)
    assert (low, high) == pytest.approx(expected)
    assert all(math.isnan(end) for end in paired_difference({0: 1.0}, base)[1:3])


def test_the_table_has_every_seed_mean_and_interval(results):
    text = comparison_table(results, TITLES, "static")
    lines = text.splitlines()
    assert lines[0] == "| network | seed 0 | seed 1 | seed 2 | mean | difference (95 % interval) | n | s a run |"
    assert lines[2] == "| static | 70.00 | 71.00 | 72.00 | 71.00 |  | 3 | 60 |"
    assert lines[3] == "| learned | 71.00 | 71.50 | 73.50 | 72.00 | +1.00 (-0.24 to +2.24) | 3 | 60 |"
    assert lines[4].startswith("| collapsed | 10.00 | 12.00 |  | 11.00 | -59.50 (")
    assert "not run" not in text
    assert lines[-1] == "Seconds on two cores."


def test_networks_that_collapsed_are_not_drawn(results, tmp_path, monkeypatch):
    ticks = []
    monkeypatch.setattr(Axes, "set_yticks", lambda self, places, names, **options: ticks.extend(names))
    draw_differences(results, TITLES, "static", tmp_path / "x.png")
    assert ticks == ["learned"]


def test_three_files_are_written(results, tmp_path, capsys):
    write_comparison(results, TITLES, "static", tmp_path / "new", "x")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["x.csv", "x.md", "x.png"]
    assert (tmp_path / "new" / "x.md").read_text(encoding="utf-8").strip() == capsys.readouterr().out.strip()
    table = rows(tmp_path / "new" / "x.csv")
    assert [(row["trial"], row["seed"], row["eval_top1"]) for row in table][3] == ("alpha", "0", "71.0")
    assert not any("second" in key for key in table[0])
