"""How much of a dynamic network runs for which images: by class, by difficulty, by edge."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dg_timm.analysis.counting import count_costs, recorded_cost
from dg_timm.analysis.recorder import recording
from dg_timm.training.data.images import Batch

NUM_BINS = 10  # of difficulty
Row = dict[str, Any]


class ImageStats(NamedTuple):
    """What is known of every image.

    Attributes:
        labels: (images,) int64.
        costs: (images,) float64, relative to the static network.
        right: (images,) bool, whether the dynamic network's prediction is right.
        edges: (images, edges) float, the weights of the edges of all stages.
        losses: (images,) float, the cross-entropy of the static network.
    """

    labels: Tensor
    costs: Tensor
    right: Tensor
    edges: Tensor
    losses: Tensor


@torch.inference_mode()
def observe_images(model: nn.Module, static: nn.Module, batches: Sequence[Batch]) -> ImageStats:
    """Run a dynamic and a static network, both in eval mode, on all images."""
    found = []
    for batch in batches:
        counts = batch.sample_mask > 0
        images, labels = batch.images[counts], batch.labels[counts]
        with recording(model) as recorder:
            logits = model(images)
        alphas = recorder.recorded
        channels, height, width = images.shape[1:]
        upper = [alpha[:, torch.ones_like(alpha[0]).triu(1).bool()] for alpha in alphas.values()]
        losses = F.cross_entropy(static(images), labels, reduction="none")
        cost = recorded_cost(model, recorder, count_costs(model, (channels, height, width)))
        found.append(ImageStats(labels, cost, logits.argmax(1) == labels, torch.cat(upper, 1), losses))
    return ImageStats(*map(torch.cat, zip(*found, strict=True)))


def by_class(stats: ImageStats, names: Sequence[str]) -> list[Row]:
    """Make a row for every class."""
    return [_row({"class": name}, stats, stats.labels == label) for label, name in enumerate(names)]


def by_difficulty(stats: ImageStats) -> list[Row]:
    """Make a row for every tenth of the images, in the order of the static network's loss."""
    rows = []
    for number, images in enumerate(stats.losses.argsort().tensor_split(NUM_BINS), start=1):
        own = torch.zeros(len(stats.losses), dtype=torch.bool)
        own[images] = True
        rows.append(_row({"tenth": number, "static_loss": round(stats.losses[own].mean().item(), 4)}, stats, own))
    return rows


def _row(start: Row, stats: ImageStats, own: Tensor) -> Row:
    return start | {
        "images": int(own.sum()),
        "cost": round(stats.costs[own].mean().item(), 4),
        "cost_std": round(stats.costs[own].std(unbiased=False).item(), 4),
        "open": round((stats.edges[own] != 0).double().mean().item(), 4),
        "top1": round(100 * stats.right[own].double().mean().item(), 2),
    }


def by_edge(stats: ImageStats, stages: Mapping[str, int]) -> list[Row]:
    """Make a row for every edge: for which share of images it is open, and how much of its variance classes explain.

    Args:
        stats: of all images.
        stages: {stage: number of nodes}.
    """
    is_open = (stats.edges != 0).double()
    labels = stats.labels.unique()
    rows: list[Row] = []
    for stage, nodes in stages.items():
        for source, target in torch.triu_indices(nodes, nodes, 1).T.tolist():
            own = is_open[:, len(rows)]
            variance = own.var(unbiased=False)
            within = torch.stack([own[stats.labels == label].var(unbiased=False) for label in labels])
            between = (1 - within.mean() / variance).item() if variance > 0 else 0.0
            rows.append({"stage": stage, "source": source, "target": target, "open": round(own.mean().item(), 4),
                         "between_classes": round(between, 4)})  # fmt: skip
    return rows


def class_distances(stats: ImageStats, names: Sequence[str]) -> list[Row]:
    """Make a row for every pair of classes, the one with the most different edge weights first."""
    means = torch.stack([stats.edges[stats.labels == label].double().mean(0) for label in range(len(names))])
    pairs = [
        {"class": names[a], "other": names[b], "distance": round((means[a] - means[b]).abs().mean().item(), 5)}
        for a in range(len(names))
        for b in range(a + 1, len(names))
    ]
    return sorted(pairs, key=lambda row: -float(row["distance"]))
