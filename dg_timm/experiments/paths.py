"""Which paths images take: how much of a dynamic network runs for which images of CIFAR-10.

    python train_scripts/experiments/paths.py --data path/to/cifar10 --static output/budgets/cifar_resnet26-0

Of the network that ships (or --model) it tells the cost by class and by difficulty (the loss of a static network on the
image, in tenths of the test images), which classes take the most different paths (mean absolute difference of the
weights of their edges), and how many edges are open for all images, for none, or for some. It draws the cheapest and
the dearest images.

Writes ``classes.csv``, ``difficulty.csv``, ``edges.csv``, ``distances.csv``, ``paths.png`` and ``wiring.png``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats as statistics
from torch import Tensor, nn

import dg_timm
from dg_timm._errors import BadValue
from dg_timm._files import atomic_path
from dg_timm.cli.errors import cli_errors
from dg_timm.experiments.image_stats import (
    ImageStats,
    Row,
    by_class,
    by_difficulty,
    by_edge,
    class_distances,
    observe_images,
)
from dg_timm.experiments.options import make_parser, results_folder
from dg_timm.graph.stage import graph_stages
from dg_timm.training.loop.csv_tables import write_csv
from dg_timm.training.run import networks, operating_points

_EXAMPLES = 3  # of the cheapest images, and of the dearest


def draw_costs(classes: Sequence[Row], tenths: Sequence[Row], path: Path) -> None:
    """Draw the cost by class and by difficulty, as a PNG."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    ordered = sorted(classes, key=lambda row: float(row["cost"]))
    left.bar([r["class"] for r in ordered], [r["cost"] for r in ordered], yerr=[r["cost_std"] for r in ordered])
    left.tick_params(axis="x", rotation=60)
    left.set_ylabel("cost (1: the static network)")
    left.set_title("by class: mean, and deviation between images", fontsize=9)
    numbers, costs, deviations = ([row[key] for row in tenths] for key in ("tenth", "cost", "cost_std"))
    right.errorbar(numbers, costs, yerr=deviations, fmt="o-", capsize=2)
    right.set_xlabel("tenth of the images, by the loss of the static network")
    right.set_title("by difficulty", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def load_networks(args: argparse.Namespace) -> tuple[Any, nn.Module]:
    """Load the dynamic and the static network that the options name, in eval mode.

    Raises:
        BadValue: if one is missing, or not of its kind.
    """
    folder = Path(args.static)
    folder = folder / "run/checkpoints/last" if (folder / "run").exists() else folder
    if not (folder / "config.json").exists():
        raise BadValue(f"{folder} has no network; train it: budgets.py --full --only cifar_resnet26 --train-only")
    model = networks.create(args.model, pretrained=not networks.implies_pretrained(args.model)).eval()
    static = networks.create(str(folder)).eval()
    if graph_stages(static) or not graph_stages(model):
        raise BadValue(f"--static {args.static} must be a static network and --model {args.model} a dynamic one")
    return model, static


def draw_extremes(model: nn.Module, images: Tensor, stats: ImageStats, names: Sequence[str], path: Path) -> None:
    """Draw the wiring of the cheapest and the dearest images, as a PNG."""
    order = stats.costs.argsort()
    chosen = torch.cat([order[:_EXAMPLES], order[-_EXAMPLES:]])
    titles = [f"{names[int(stats.labels[k])]}, cost {stats.costs[k]:.2f}" for k in chosen]
    dg_timm.draw_wiring(dg_timm.adjacency(model, images[chosen]), path, images=images[chosen], titles=titles)


def summarize(stats: ImageStats, edges: Sequence[Row], pairs: Sequence[Row]) -> str:
    """Write the figures in a few lines."""
    shares = [float(row["open"]) for row in edges]
    rank = statistics.spearmanr(stats.losses.numpy(), stats.costs.numpy())
    most = "; ".join(f"{pair['class']} and {pair['other']} {pair['distance']}" for pair in pairs[:3])
    return "\n".join([
        f"{len(stats.costs)} images: cost {stats.costs.mean():.3f}, deviation between images {stats.costs.std():.3f}",
        f"{len(shares)} edges: open for all images {sum(s == 1 for s in shares)}, "
        f"for none {sum(s == 0 for s in shares)}, for some {sum(0 < s < 1 for s in shares)}",
        f"cost and difficulty: rank correlation {rank.statistic:+.3f} (p = {rank.pvalue:.1g})",
        f"most different classes: {most}",
        f"least different: {pairs[-1]['class']} and {pairs[-1]['other']} {pairs[-1]['distance']}",
    ])  # fmt: skip


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = make_parser(__doc__)
    operating_points.add_options(parser)
    parser.add_argument("--model", default="dg_cifar_resnet26.cifar10", help="dynamic network, as for calibrate.py")
    parser.add_argument(
        "--static",
        required=True,
        help="trial or folder of the static network whose loss says how difficult an image is",
    )
    parser.add_argument("--results", type=Path, help="folder of the results; by default results/experiments/paths")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = args.results or results_folder() / "paths"
    model, static = load_networks(args)
    args.refit_norms = 0
    batches, _ = operating_points.load_batches(args, model)
    stats = observe_images(model, static, batches)
    names = list(model.pretrained_cfg["label_names"])
    stages = {name: len(stage.edges) for name, stage in graph_stages(model).items()}
    classes, tenths = by_class(stats, names), by_difficulty(stats)
    edges, pairs = by_edge(stats, stages), class_distances(stats, names)
    for name, rows in {"classes": classes, "difficulty": tenths, "edges": edges, "distances": pairs}.items():
        write_csv(results / f"{name}.csv", rows)
    draw_costs(classes, tenths, results / "paths.png")
    images = torch.cat([batch.images[batch.sample_mask > 0] for batch in batches])
    draw_extremes(model, images, stats, names, results / "wiring.png")
    print(summarize(stats, edges, pairs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
