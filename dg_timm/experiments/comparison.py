"""Compare networks over seeds: top-1 of each, and 95 % intervals of the paired differences from one of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from dg_timm._files import atomic_path, atomic_write
from dg_timm._tables import markdown_table
from dg_timm.experiments.trial import Result
from dg_timm.training.loop.csv_tables import write_csv

COLLAPSED_MARGIN = 20.0  # points of top-1 below the base, at which a network has collapsed and is not drawn


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> tuple[float, float, float, int]:
    """Average the differences from ``base`` over the seeds that both have.

    Returns:
        the mean, both ends of its 95 % interval (Student's t; NaN for fewer than two seeds), and the number of seeds.
    """
    differences = np.array([values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())])
    mean, n = float(differences.mean()), len(differences)
    if n < 2:
        return mean, float("nan"), float("nan"), n
    half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5)
    return mean, mean - half, mean + half, n


def write_comparison(results: Sequence[Result], titles: Mapping[str, str], base: str, folder: Path, name: str) -> None:
    """Write ``NAME.csv`` (a row for each trial, without times), ``NAME.md`` and ``NAME.png``; print the table.

    Args:
        results: of all trials.
        titles: of the trials' names, in the order of the table.
        base: name of the trials that differences are taken from.
        folder: where the files go.
        name: of the files, without suffix.
    """
    write_csv(folder / f"{name}.csv", [{"trial": r.trial.name, "seed": r.trial.seed, **r.figures} for r in results])
    text = comparison_table(results, titles, base)
    atomic_write(folder / f"{name}.md", text)
    draw_differences(results, titles, base, folder / f"{name}.png")
    print(text)


def top1_by_seed(results: Sequence[Result], name: str) -> dict[int, float]:
    """Find the top-1 (%) of the trials of one name by seed."""
    return {r.trial.seed: r.figures["eval_top1"] for r in results if r.trial.name == name}


def comparison_table(results: Sequence[Result], titles: Mapping[str, str], base: str) -> str:
    """Write in Markdown the top-1 of every seed, the mean, and its difference from the base's on the same seeds."""
    seeds = sorted({result.trial.seed for result in results})
    header = ["network", *(f"seed {s}" for s in seeds), "mean", "difference (95 % interval)", "n", "s a run"]
    of_base = top1_by_seed(results, base)
    rows = []
    for name, title in titles.items():
        found = top1_by_seed(results, name)
        if not found:
            continue
        own = [f"{found[seed]:.2f}" if seed in found else None for seed in seeds]
        seconds = [result.seconds for result in results if result.trial.name == name]
        difference, n = "", len(found)
        if name != base and found.keys() & of_base.keys():
            mean, low, high, n = paired_difference(found, of_base)
            difference = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" if n > 1 else f"{mean:+.2f}"
        mean_top1 = f"{sum(found.values()) / len(found):.2f}"
        rows.append([title, *own, mean_top1, difference, n, f"{sum(seconds) / len(seconds):.0f}"])
    return f"{markdown_table(header, rows)}\n\nSeconds on {results[0].hardware}.\n"


def draw_differences(results: Sequence[Result], titles: Mapping[str, str], base: str, path: Path) -> None:
    """Draw differences from the base: a dot for each seed, and the 95 % interval of the mean.

    Networks that collapsed are left out.
    """
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    of_base = top1_by_seed(results, base)
    drawn = [
        name for name in titles
        if name != base and (found := top1_by_seed(results, name)).keys() & of_base.keys()
        and max(found.values()) > min(of_base.values()) - COLLAPSED_MARGIN
    ]  # fmt: skip
    for row, name in enumerate(reversed(drawn)):
        found = top1_by_seed(results, name)
        dots = [value - of_base[seed] for seed, value in found.items() if seed in of_base]
        axes.plot(dots, [row] * len(dots), "o", color="0.6", ms=4)
        mean, low, high, n = paired_difference(found, of_base)
        axes.errorbar(mean, row, xerr=[[mean - low], [high - mean]] if n > 1 else None, fmt="s", color="C0", capsize=3)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(drawn)), [titles[name] for name in reversed(drawn)], fontsize=8)
    axes.set_xlabel(f"top-1, points above {titles[base]} of the same seed")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
