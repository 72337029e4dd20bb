"""What the wiring does: how much of a dynamic network runs for which images of CIFAR-10.

    python train_scripts/experiments/paths.py --data path/to/cifar10 --static output/budgets/cifar_resnet26-0

Of the network that ships (or --model): cost by class and by difficulty (the loss of a static network on the image, in
tenths of the test images), which classes are wired most differently (mean absolute difference of the weights of their
edges), how many edges are open for all images, for none, or for some, and pictures of the cheapest and dearest images.

Writes ``classes.csv``, ``difficulty.csv``, ``edges.csv``, ``distances.csv``, ``paths.png`` and ``wiring.png``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn

import dg_timm
from dg_timm.analysis.counting import relative_cost
from dg_timm.analysis.recorder import record_adjacency
from dg_timm.cli import calibrate
from dg_timm.experiments.runner import RESULTS
from dg_timm.graph.stage import graph_stages
from dg_timm.training.data.loading import Batch
from dg_timm.training.run import networks as models
from dg_timm.training.run.report import write_csv

TENTHS = 10
EXAMPLES = 3


class Looked(NamedTuple):
    """Of every image: label, cost, whether the dynamic network is right, weights of edges, loss of the static one."""

    labels: Tensor
    costs: Tensor
    right: Tensor
    edges: Tensor
    losses: Tensor


@torch.inference_mode()
def look(model: nn.Module, static: nn.Module, batches: Sequence[Batch]) -> Looked:
    columns: list[list[Tensor]] = [[] for _ in Looked._fields]
    for batch in batches:
        counts = batch.weights > 0
        images, labels = batch.images[counts], batch.labels[counts]
        with record_adjacency(model) as alphas:
            logits = model(images)
        channels, height, width = images.shape[1:]
        upper = [alpha[:, torch.ones_like(alpha[0]).triu(1).bool()] for alpha in alphas.values()]
        losses = F.cross_entropy(static(images), labels, reduction="none")
        cost = relative_cost(model, alphas, (channels, height, width))
        for column, value in zip(
            columns, (labels, cost, logits.argmax(1) == labels, torch.cat(upper, 1), losses), strict=True
        ):
            column.append(value)
    return Looked(*map(torch.cat, columns))


def by_class(looked: Looked, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for label, name in enumerate(names):
        own = looked.labels == label
        rows.append(_row({"class": name}, looked, own))
    return rows


def by_difficulty(looked: Looked) -> list[dict[str, Any]]:
    order = looked.losses.argsort()
    rows = []
    for tenth, images in enumerate(order.tensor_split(TENTHS)):
        own = torch.zeros(len(order), dtype=torch.bool)
        own[images] = True
        rows.append(_row({"tenth": tenth + 1, "static_loss": round(looked.losses[own].mean().item(), 4)}, looked, own))
    return rows


def _row(start: dict[str, Any], looked: Looked, own: Tensor) -> dict[str, Any]:
    return start | {
        "images": int(own.sum()),
        "cost": round(looked.costs[own].mean().item(), 4),
        "cost_std": round(looked.costs[own].std(unbiased=False).item(), 4),
        "open": round((looked.edges[own] != 0).double().mean().item(), 4),
        "top1": round(100 * looked.right[own].double().mean().item(), 2),
    }


def edge_rows(looked: Looked, stages: dict[str, int]) -> list[dict[str, Any]]:
    """Of every edge the share of images for which it is open, and how much of its variance lies between classes."""
    opened = (looked.edges != 0).double()
    rows = []
    column = 0
    for stage, nodes in stages.items():
        for source, target in torch.triu_indices(nodes, nodes, 1).T.tolist():
            own = opened[:, column]
            mean, variance = own.mean(), own.var(unbiased=False)
            within = torch.stack([own[looked.labels == label].var(unbiased=False) for label in looked.labels.unique()])
            between = (1 - within.mean() / variance).item() if variance > 0 else 0.0
            rows.append({"stage": stage, "source": source, "target": target, "open": round(mean.item(), 4),
                         "between_classes": round(between, 4)})  # fmt: skip
            column += 1
    return rows


def distances(looked: Looked, names: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs of classes, the most differently wired first."""
    means = torch.stack([looked.edges[looked.labels == label].double().mean(0) for label in range(len(names))])
    pairs = [
        {"class": names[a], "other": names[b], "distance": round((means[a] - means[b]).abs().mean().item(), 5)}
        for a in range(len(names))
        for b in range(a + 1, len(names))
    ]
    return sorted(pairs, key=lambda row: -float(row["distance"]))


def draw(classes: Sequence[dict[str, Any]], tenths: Sequence[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    ordered = sorted(classes, key=lambda row: float(row["cost"]))
    left.bar([r["class"] for r in ordered], [r["cost"] for r in ordered], yerr=[r["cost_std"] for r in ordered])
    left.tick_params(axis="x", rotation=60)
    left.set_ylabel("cost (1: the static network)")
    left.set_title("by class: mean, and deviation between images", fontsize=9)
    right.errorbar(
        [r["tenth"] for r in tenths],
        [r["cost"] for r in tenths],
        yerr=[r["cost_std"] for r in tenths],
        fmt="o-",
        capsize=2,
    )
    right.set_xlabel("tenth of the images, by the loss of the static network")
    right.set_title("by difficulty", fontsize=9)
    figure.savefig(path, format="png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calibrate.add_options(parser)
    parser.add_argument("--model", default="dg_cifar_resnet26.cifar10")
    parser.add_argument("--static", required=True, help="cell or folder of the static network whose loss is difficulty")
    parser.add_argument("--results", type=Path, default=RESULTS / "paths")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(args.static)
    folder = folder / "run/checkpoints/last" if (folder / "run").exists() else folder
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no network; train it: budgets.py --full --only cifar_resnet26 --train-only")
    model: Any = models.create(args.model, pretrained=not models.names_weights(args.model)).eval()
    static = models.create(str(folder)).eval()
    if graph_stages(static) or not graph_stages(model):
        raise ValueError(f"--static {args.static} must be a static network and --model {args.model} a dynamic one")
    args.refit_norms = 0
    batches, _ = calibrate.load_batches(args, model)
    looked = look(model, static, batches)
    names = list(model.pretrained_cfg["label_names"])
    stages = {name: alpha.shape[1] for name, alpha in dg_timm.adjacency(model, batches[0].images[:1]).items()}
    args.results.mkdir(parents=True, exist_ok=True)
    classes, tenths, edges, pairs = (
        by_class(looked, names), by_difficulty(looked), edge_rows(looked, stages), distances(looked, names)
    )  # fmt: skip
    for name, rows in {"classes": classes, "difficulty": tenths, "edges": edges, "distances": pairs}.items():
        write_csv(args.results / f"{name}.csv", rows)
    draw(classes, tenths, args.results / "paths.png")
    order = looked.costs.argsort()
    chosen = torch.cat([order[:EXAMPLES], order[-EXAMPLES:]])
    images = torch.cat([batch.images[batch.weights > 0] for batch in batches])[chosen]
    titles = [f"{names[int(looked.labels[k])]}, cost {looked.costs[k]:.2f}" for k in chosen]
    dg_timm.draw_wiring(dg_timm.adjacency(model, images), args.results / "wiring.png", images=images, titles=titles)

    shares = [float(row["open"]) for row in edges]
    rank = stats.spearmanr(looked.losses.numpy(), looked.costs.numpy())
    print(
        f"{len(looked.costs)} images: cost {looked.costs.mean():.3f}, deviation between images {looked.costs.std():.3f}"
    )
    print(
        f"{len(shares)} edges: open for all images {sum(s == 1 for s in shares)}, "
        f"for none {sum(s == 0 for s in shares)}, for some {sum(0 < s < 1 for s in shares)}"
    )
    print(f"cost and difficulty: rank correlation {rank.statistic:+.3f} (p = {rank.pvalue:.1g})")
    print("most different classes: " + "; ".join(f"{p['class']} and {p['other']} {p['distance']}" for p in pairs[:3]))
    print(f"least different: {pairs[-1]['class']} and {pairs[-1]['other']} {pairs[-1]['distance']}")
    return 0
