"""Look at the dynamic backbone of a detector: what its graph does with images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dg_timm._modes import evaluating
from dg_timm.analysis.counting import relative_cost
from dg_timm.analysis.recorder import adjacency
from dg_timm.graph.stage import graph_stages
from dg_timm.training.loop.report import Row


def preprocess(detector: Any, image: Tensor) -> Tensor:
    """Resize and normalize an image as the detector does before its backbone.

    Args:
        image: (3, height, width) in 0..1.

    Returns:
        (1, 3, height, width), padded to multiples of 32 pixels.
    """
    with evaluating(detector.transform):
        tensors: Tensor = detector.transform([image])[0].tensors
    return tensors


def detector_statistics(detector: Any, images: Sequence[Tensor]) -> Row:
    """Average what the graph of a dynamic backbone does over images.

    Args:
        images: (3, height, width) in 0..1 each.

    Returns:
        For each stage ``weight.NAME``, the mean absolute weight of its edges, and ``open.NAME``, the fraction of its
        edges that are open; and ``cost``, relative to the static network. Nothing for a static backbone or no images.
    """
    body = detector.backbone.body
    if not graph_stages(body) or not images:
        return {}
    values: dict[str, list[float]] = {}
    for image in images:
        seen = preprocess(detector, image)
        alphas = adjacency(body, seen)
        for name, alpha in alphas.items():
            sources, targets = torch.triu_indices(alpha.shape[1], alpha.shape[2], offset=1)
            edges = alpha[:, sources, targets]
            values.setdefault(f"weight.{name}", []).append(edges.abs().mean().item())
            values.setdefault(f"open.{name}", []).append((edges != 0).float().mean().item())
        cost = relative_cost(body, alphas, (seen.shape[1], seen.shape[2], seen.shape[3]))
        values.setdefault("cost", []).append(cost.mean().item())
    return {name: round(float(np.mean(of_images)), 5) for name, of_images in values.items()}
