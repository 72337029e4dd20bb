"""CIFAR-10 from scratch: one network, wired in different ways (the paper's Tables 4 and 6 in small).

    python train_scripts/experiments/ablation.py --data path/to/cifar10           # 16 px: four hours on two cores
    python train_scripts/experiments/ablation.py --data uoft-cs/cifar10 --full    # 32 px, 100 epochs: for a GPU

Every wiring has the same blocks, recipe, seeds, images and order of images. Writes ``ablation.csv`` (a row a cell),
``ablation.md`` and ``ablation.png`` (means, and 95 % intervals of the differences from the static network).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cells import Cell, Result, add_options, paired, run, write_csv
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dg_timm.training.report import write_beside

STATIC = "cifar_resnet26"
VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {  # title, options of the dynamic network
    "static": ("static chain", {}),
    "alpha_b": ("alpha_b: weights for each image", {}),
    "alpha": ("alpha: learned weights, the same for all images", {"instance_aware": False}),
    "no_shortcut": ("alpha_b without the blocks' shortcuts", {"block_shortcut": False}),
    "paper": ("... and without edge scales: the paper to the letter", {"block_shortcut": False, "edge_scale": False}),
    "er": ("ER(0.2), weights the same for all images", {"wiring": "er", "instance_aware": False}),
    "ba": ("BA(5), the same", {"wiring": "ba", "instance_aware": False}),
    "ws": ("WS(4, 0.75), the same", {"wiring": "ws", "instance_aware": False}),
    "ws_b": ("WS(4, 0.75), weights for each image", {"wiring": "ws"}),
}


def cells(seeds: Sequence[int], names: Sequence[str], recipe: str) -> list[Cell]:
    """Seed by seed: what is interrupted has all variants of the seeds that are done."""
    found = []
    for seed in seeds:
        for name in names:
            kwargs = dict(VARIANTS[name][1])
            if "wiring" in kwargs:
                kwargs["wiring_seed"] = seed
            options = {"recipe": recipe, "model": STATIC if name == "static" else f"dg_{STATIC}"}
            found.append(Cell(name, options | ({"model-kwargs": kwargs} if kwargs else {}), seed))
    return found


def by_seed(results: Sequence[Result], name: str) -> dict[int, float]:
    return {r.cell.seed: r.figures["eval_top1"] for r in results if r.cell.name == name}


def table(results: Sequence[Result]) -> str:
    """Markdown: top-1 of every seed, the mean, and its difference from the static network's on the same seeds."""
    seeds = sorted({result.cell.seed for result in results})
    lines = [
        f"| wiring | {' | '.join(f'seed {s}' for s in seeds)} | mean | difference (95 % interval) | n | s a run |",
        f"|---|{'---|' * (len(seeds) + 4)}",
    ]
    static = by_seed(results, "static")
    for name, (title, _) in VARIANTS.items():
        found = by_seed(results, name)
        if not found:
            continue
        own = [f"{found[seed]:.2f}" if seed in found else "" for seed in seeds]
        seconds = [result.seconds for result in results if result.cell.name == name]
        difference, n = "", len(found)
        if name != "static" and found.keys() & static.keys():
            mean, low, high, n = paired(found, static)
            difference = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" if n > 1 else f"{mean:+.2f}"
        lines.append(
            f"| {title} | {' | '.join(own)} | {sum(found.values()) / len(found):.2f} | {difference} | {n} | "
            f"{sum(seconds) / len(seconds):.0f} |"
        )
    return "\n".join([*lines, "", f"Seconds on {results[0].hardware}.", ""])


def draw(results: Sequence[Result], path: str) -> None:
    """Differences from the static network: a dot a seed, and the 95 % interval of the mean."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    static = by_seed(results, "static")
    drawn = [name for name in VARIANTS if name != "static" and by_seed(results, name).keys() & static.keys()]
    for row, name in enumerate(reversed(drawn)):
        found = by_seed(results, name)
        axes.plot([v - static[s] for s, v in found.items() if s in static], [row] * len(found), "o", color="0.6", ms=4)
        mean, low, high, n = paired(found, static)
        axes.errorbar(mean, row, xerr=[[mean - low], [high - mean]] if n > 1 else None, fmt="s", color="C0", capsize=3)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(drawn)), [VARIANTS[name][0] for name in reversed(drawn)], fontsize=8)
    axes.set_xlabel("top-1, points above the static network of the same seed")
    figure.savefig(path, format="png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "ablation")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--full", action="store_true", help="the recipe cifar10_full in place of cifar10_scratch")
    args = parser.parse_args()
    results = run(cells(args.seeds, args.only, "cifar10_full" if args.full else "cifar10_scratch"), args)
    if not results:
        print("no cell is finished")
        return 1
    write_csv(args.results / "ablation.csv", [{"cell": r.cell.name, "seed": r.cell.seed, **r.figures} for r in results])
    write_beside(args.results / "ablation.md", text := table(results))
    draw(results, str(args.results / "ablation.png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
