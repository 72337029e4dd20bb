"""Pictures of what benchmark.py measured."""

from pathlib import Path
from typing import Any

from dg_timm._files import atomic_path
from dg_timm.benchmarks.report import LINE
from dg_timm.benchmarks.setting import Row

_IN_A_NAME = ("model", "way", "mode", "shape", "in_degree", "batch_size", "image_size", "layout", "dtype")


def draw_results(path: Path, result: dict[str, Any]) -> None:
    """Draw the times of a sweep over cost, or what else was measured as bars; the suffix of ``path`` is the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    if "sweep" in result:
        _draw_lines(figure, result["sweep"], result["fits"])
    else:
        kind = next(key for key in ("times", "memory", "aggregation") if key in result)
        _draw_bars(figure, result[kind], kind)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=140)


def _draw_lines(figure: Any, rows: list[Row], fits: list[Row]) -> None:
    axes = figure.subplots()
    for fit in fits:
        own = [row for row in rows if all(row[key] == fit[key] for key in LINE)]
        label = f"{', '.join(str(fit[key]) for key in LINE)} (R² {fit['r_squared']:.3f})"
        costs = [row["cost"] for row in own]
        (line,) = axes.plot(costs, [row["ratio"] for row in own], "o", label=label)
        ends = [min(costs), max(costs)]
        axes.plot(ends, [fit["intercept"] + fit["slope"] * x for x in ends], "-", color=line.get_color(), lw=1)
    axes.set_xlabel("predicted: multiply-adds relative to the static network")
    axes.set_ylabel("measured: time relative to the static network")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _draw_bars(figure: Any, rows: list[Row], kind: str) -> None:
    figure.set_size_inches(9, max(2.5, 0.22 * len(rows) + 1))
    axes = figure.subplots()
    key = "share" if kind == "aggregation" else "ratio"
    names = [" ".join(str(row[k]) for k in _IN_A_NAME if k in row) for row in rows]
    values = [row[key] for row in rows]
    spread = [[row[key] - row.get("low", row[key]) for row in rows],
              [row.get("high", row[key]) - row[key] for row in rows]]  # fmt: skip
    places = range(len(names))  # two bars may have one name
    axes.barh(places, values, xerr=spread, color="tab:blue", error_kw={"lw": 1})
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.axvline(1.0, color="black", lw=1)
    axes.invert_yaxis()
    unit = "share of the copy bandwidth" if kind == "aggregation" else f"{kind} relative to the static network"
    axes.set_xlabel(unit)
