"""What an evaluation keeps of each image, and the figures that it makes of all of them, for each task."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from dg_timm._errors import BadValue
from dg_timm.hub.labeling import Labeling
from dg_timm.training.loop.metrics import ClassificationMetrics
from dg_timm.training.loop.report import MAP, TOP1, Metric

_MOST_RANKS = 5  # of the best classes that are kept of an image


class Figures(NamedTuple):
    """How a task is evaluated.

    Attributes:
        metric: the figure that is to grow.
        width: number of columns that are kept of an image.
        keep: (logits, labels) -> (batch, width) float64; a row depends on its image alone.
        summarize: (images, width) in the order of the data set -> figures by name.
    """

    metric: Metric
    width: int
    keep: Callable[[Tensor, Tensor], Tensor]
    summarize: Callable[[Tensor], dict[str, float]]


def figures_of(labeling: Labeling, num_classes: int) -> Figures:
    """Return how a network of so many classes is evaluated."""
    if labeling.task == "multilabel":
        return Figures(MAP, 1 + 2 * num_classes, keep_scores, average_precision)
    loss = cross_entropy_of_each if labeling.independent is False else binary_cross_entropy_of_each
    return Figures(TOP1, 2 + _MOST_RANKS, lambda logits, labels: _keep_ranks(logits, labels, loss), count_ranks)


def cross_entropy_of_each(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, with a class or with a share of every class: (batch,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def binary_cross_entropy_of_each(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each image, averaged over its classes: (batch,)."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


def _keep_ranks(logits: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Keep the label (of soft labels the likeliest), the loss, and the five best classes; -1 where there are fewer."""
    best = logits.topk(min(_MOST_RANKS, logits.shape[1])).indices
    best = F.pad(best, (0, _MOST_RANKS - best.shape[1]), value=-1)
    label = labels.argmax(1) if labels.ndim == 2 else labels
    columns = (label[:, None], loss(logits, labels)[:, None], best)
    return torch.cat([column.double() for column in columns], dim=1)


def count_ranks(table: Tensor) -> dict[str, float]:
    """Make ``loss``, ``top1`` and, of five classes or more, ``top5`` (percent)."""
    ranked = table[:, 2:].long()
    ranked = ranked[:, : int((ranked[0] >= 0).sum())]
    found: dict[str, float] = ClassificationMetrics(keep_in_memory=True).compute(
        predictions=ranked.tolist(), references=table[:, 0].long().tolist(), losses=table[:, 1].tolist()
    )
    return found


def keep_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Keep the loss, all logits and all labels: a ranking needs those of all images."""
    columns = (binary_cross_entropy_of_each(logits, labels)[:, None], logits, labels)
    return torch.cat([column.double() for column in columns], dim=1)


def average_precision(table: Tensor) -> dict[str, float]:
    """Make the figures of several labels from loss, logits and labels of all images.

    Returns:
        ``loss``; ``map``, the mean over the classes of their average precision, and ``macro_f1``, that of their F1 at a
        probability of 0.5, both over the ``map_classes`` classes that some image has; and ``micro_f1``, over all
        decisions. In percent.

    Raises:
        BadValue: no image has a label.
    """
    logits, labels = table[:, 1:].numpy().reshape(len(table), 2, -1).transpose(1, 0, 2)
    seen = labels.any(0)
    if not seen.any():
        raise BadValue("no image to evaluate on has a label, so that there is no mAP; give others with --val-data")
    decided = logits >= 0  # a probability of 0.5
    # Ranked by logits: many sigmoids are 1 in float32.
    found = average_precision_score(labels[:, seen], logits[:, seen], average=None)
    return {
        "loss": float(table[:, 0].numpy().mean()),
        "map": 100 * float(np.mean(found)),
        "micro_f1": 100 * float(f1_score(labels.ravel(), decided.ravel(), zero_division=0)),
        "macro_f1": 100 * _macro_f1(labels[:, seen], decided[:, seen]),
        "map_classes": int(seen.sum()),
    }


def _macro_f1(labels: np.ndarray, decided: np.ndarray) -> float:
    each = [f1_score(labels[:, k], decided[:, k], zero_division=0) for k in range(labels.shape[1])]
    return float(np.mean(each))
