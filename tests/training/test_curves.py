"""curves.png: what a run shows of itself, with the cost where one is aimed at."""

import pytest

from dg_timm.training.loop.report import TOP1, draw_curves
from dg_timm.training.run.targets import Aim, value_of

UPDATES = [{"update": at, "loss": 2.0, "lr": 0.1} for at in (1, 2)]
STATIC = {"epoch": 1, "updates": 2, "train_loss": 2.0, "train_top1": 50.0, "eval_loss": 2.1, "eval_top1": 40.0}
DYNAMIC = STATIC | {"cost": 1.1}
AIMING = DYNAMIC | {
    "train_cost": 0.8,
    "eval_cost": 0.9,
    "eval_cost@0.6": 0.7,
    "eval_top1@0.6": 35.0,
    "eval_value": 31.0,
}


@pytest.fixture
def draw(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []

    class Figure(figure_module.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(figure_module, "Figure", Figure)

    def panels(row, metric):
        draw_curves([row], UPDATES, tmp_path / "curves.png", metric)
        assert (tmp_path / "curves.png").stat().st_size > 1000
        axes = figures[-1].axes
        return {one.get_title(): one for one in axes}

    return panels


def lines(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_static_network_has_no_cost(draw):
    assert list(draw(STATIC, TOP1)) == ["loss", "top-1 (%)", "learning rate"]


def test_a_dynamic_network_shows_what_it_costs(draw):
    assert lines(draw(DYNAMIC, TOP1)["cost of an image (static network: 1)"]) == ["evaluation"]


def test_of_a_range_every_budget_is_shown_with_the_costs_aimed_at(draw):
    panels = draw(AIMING, value_of(TOP1, Aim((0.6, 1.0))))
    assert list(panels) == ["loss", "top-1 (%)", "cost of an image (static network: 1)", "learning rate"]
    assert lines(panels["loss"]) == ["training, with the price on cost", "evaluation"]
    assert lines(panels["top-1 (%)"]) == ["training", "evaluation", "evaluation, budget 0.6"]
    cost = panels["cost of an image (static network: 1)"]
    assert lines(cost) == ["training", "evaluation", "evaluation, budget 0.6"]
    assert [line.get_ydata()[0] for line in cost.lines if line.get_linestyle() == ":"] == [0.6, 1.0]
