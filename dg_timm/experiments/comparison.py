"""Networks compared over seeds: top-1 of each, and 95 % intervals of the paired differences from one of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dg_timm.experiments.runner import Result, paired
from dg_timm.training.run.report import write_beside, write_csv

DEAD = 20.0  # points below the base


def write(results: Sequence[Result], titles: Mapping[str, str], base: str, folder: Path, name: str) -> None:
    """``NAME.csv`` (a row a cell, no times), ``NAME.md`` and ``NAME.png``; the table is printed, too.

    Args:
        titles: of the cells' names, in the order of the table.
        base: name of the cells that differences are taken from.
    """
    write_csv(folder / f"{name}.csv", [{"cell": r.cell.name, "seed": r.cell.seed, **r.figures} for r in results])
    text = table(results, titles, base)
    write_beside(folder / f"{name}.md", text)
    draw(results, titles, base, folder / f"{name}.png")
    print(text)


def by_seed(results: Sequence[Result], name: str) -> dict[int, float]:
    return {r.cell.seed: r.figures["eval_top1"] for r in results if r.cell.name == name}


def table(results: Sequence[Result], titles: Mapping[str, str], base: str) -> str:
    """Markdown: top-1 of every seed, the mean, and its difference from the base's on the same seeds."""
    seeds = sorted({result.cell.seed for result in results})
    lines = [
        f"| wiring | {' | '.join(f'seed {s}' for s in seeds)} | mean | difference (95 % interval) | n | s a run |",
        f"|---|{'---|' * (len(seeds) + 4)}",
    ]
    of_base = by_seed(results, base)
    for name, title in titles.items():
        found = by_seed(results, name)
        if not found:
            continue
        own = [f"{found[seed]:.2f}" if seed in found else "" for seed in seeds]
        seconds = [result.seconds for result in results if result.cell.name == name]
        difference, n = "", len(found)
        if name != base and found.keys() & of_base.keys():
            mean, low, high, n = paired(found, of_base)
            difference = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" if n > 1 else f"{mean:+.2f}"
        lines.append(
            f"| {title} | {' | '.join(own)} | {sum(found.values()) / len(found):.2f} | {difference} | {n} | "
            f"{sum(seconds) / len(seconds):.0f} |"
        )
    return "\n".join([*lines, "", f"Seconds on {results[0].hardware}.", ""])


def draw(results: Sequence[Result], titles: Mapping[str, str], base: str, path: Path) -> None:
    """Differences from the base: a dot a seed, and the 95 % interval of the mean; dead networks are left out."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    of_base = by_seed(results, base)
    drawn = [
        name for name in titles
        if name != base and (found := by_seed(results, name)).keys() & of_base.keys()
        and max(found.values()) > min(of_base.values()) - DEAD
    ]  # fmt: skip
    for row, name in enumerate(reversed(drawn)):
        found = by_seed(results, name)
        axes.plot(
            [v - of_base[s] for s, v in found.items() if s in of_base], [row] * len(found), "o", color="0.6", ms=4
        )
        mean, low, high, n = paired(found, of_base)
        axes.errorbar(mean, row, xerr=[[mean - low], [high - mean]] if n > 1 else None, fmt="s", color="C0", capsize=3)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(drawn)), [titles[name] for name in reversed(drawn)], fontsize=8)
    axes.set_xlabel(f"top-1, points above {titles[base]} of the same seed")
    figure.savefig(path, format="png", dpi=120)
