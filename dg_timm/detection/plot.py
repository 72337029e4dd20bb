"""Predictions beside the truth, with the wiring of the image."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dg_timm.analysis.counting import relative_cost
from dg_timm.analysis.recorder import adjacency
from dg_timm.detection.data.boxes import Categories, DetectionSplit
from dg_timm.detection.data.loading import read_image
from dg_timm.detection.evaluation import Detections
from dg_timm.graph.stage import graph_stages
from dg_timm.training.run.report import Row


def preprocessed(detector: Any, image: Tensor) -> Tensor:
    """(1, 3, height, width): an image (3, height, width) in 0..1 as the detector's backbone sees it."""
    training = detector.training
    tensors: Tensor = detector.eval().transform([image])[0].tensors
    detector.train(training)
    return tensors


def detector_statistics(detector: Any, images: Sequence[Tensor]) -> Row:
    """Of a dynamic backbone, means over images: |weight| and open fraction of every stage, cost relative to static."""
    body = detector.backbone.body
    if not graph_stages(body) or not images:
        return {}
    sums: dict[str, list[float]] = {}
    for image in images:
        seen = preprocessed(detector, image)
        alphas = adjacency(body, seen)
        for name, alpha in alphas.items():
            sources, targets = torch.triu_indices(alpha.shape[1], alpha.shape[2], offset=1)
            edges = alpha[:, sources, targets]
            sums.setdefault(f"weight.{name}", []).append(edges.abs().mean().item())
            sums.setdefault(f"open.{name}", []).append((edges != 0).float().mean().item())
        cost = relative_cost(body, alphas, (seen.shape[1], seen.shape[2], seen.shape[3]))
        sums.setdefault("cost", []).append(cost.mean().item())
    return {name: round(float(np.mean(values)), 5) for name, values in sums.items()}


def draw_detections(
    detector: Any,
    split: DetectionSplit,
    found: Sequence[Detections],
    categories: Categories,
    file: Path,
    *,
    least_score: float = 0.5,
) -> Path:
    """Write a PNG with a row an image: truth, predictions, and the weights of its open edges, stage by stage.

    Args:
        found: of the images to draw.
        least_score: of the predictions that are drawn.

    Raises:
        ImportError: without matplotlib, naming the extra.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'dg-timm[detect]'") from error
    body, device = detector.backbone.body, next(detector.parameters()).device
    stages = {name: stage for name, stage in graph_stages(body).items() if len(stage.block_names) > 1}
    widths = [3.0, 3.0] + [1.6] * len(stages)
    figure = Figure(figsize=(sum(widths), 2.4 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(widths), width_ratios=widths, squeeze=False)
    colours = matplotlib.colormaps["tab10" if len(categories.names) <= 10 else "tab20"]

    def draw_boxes(panel: Any, boxes: np.ndarray, labels: np.ndarray, texts: Sequence[str]) -> None:
        for (left, top, right, bottom), label, text in zip(boxes, labels, texts, strict=True):
            colour = colours((int(label) - 1) % colours.N)
            panel.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, linewidth=1))
            panel.text(left, top, text, fontsize=4, color="white", bbox=dict(facecolor=colour, pad=0.5, linewidth=0))

    for panels, one in zip(axes, found, strict=True):
        row = split.rows[one.row]
        image = read_image(split, one.row)
        shown = one.scores >= least_score
        predicted = [f"{categories.names[k - 1]} {s:.2f}" for k, s in zip(one.labels, one.scores, strict=True)]
        columns = (
            (f"truth, image {row.image_id}", row.boxes, row.labels, [categories.names[k - 1] for k in row.labels]),
            (f"predictions from {least_score:g}", one.boxes[shown], one.labels[shown],
             [text for text, keep in zip(predicted, shown, strict=True) if keep]),
        )  # fmt: skip
        for panel, (title, boxes, labels, texts) in zip(panels[:2], columns, strict=True):
            panel.imshow(image)
            panel.set_title(title, fontsize=7)
            panel.axis("off")
            draw_boxes(panel, boxes, labels, texts)
        if not stages:
            continue
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).to(device) / 255
        alphas = adjacency(body, preprocessed(detector, pixels))
        for panel, name in zip(panels[2:], stages, strict=True):
            alpha = alphas[name][0].float().cpu().numpy()
            panel.set_facecolor("0.93")  # no edge, or a closed one
            shades = np.ma.array(alpha, mask=alpha == 0)
            drawn = panel.imshow(shades, cmap="viridis", vmin=min(0.0, float(alpha.min())))
            panel.set_title(f"{name}, {int((alpha != 0).sum())} edges open", fontsize=6)
            panel.set_xlabel("target", fontsize=5)
            panel.set_ylabel("source", fontsize=5)
            panel.tick_params(labelsize=5)
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True))
            figure.colorbar(drawn, ax=panel, shrink=0.6).ax.tick_params(labelsize=5)
    FigureCanvasAgg(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.tmp")
    figure.savefig(beside, format="png", dpi=150)
    os.replace(beside, file)
    return file
