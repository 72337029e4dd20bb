"""Draw detections beside the truth, with the wiring of each image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dg_timm._errors import MissingPackage
from dg_timm._files import atomic_path
from dg_timm.analysis.recorder import adjacency
from dg_timm.detection.data.boxes import Categories, DetectionSplit
from dg_timm.detection.data.loading import read_image
from dg_timm.detection.evaluation import Detections
from dg_timm.detection.observation import preprocess
from dg_timm.graph.stage import graph_stages

_DPI = 150


def draw_detections(
    detector: Any,
    split: DetectionSplit,
    found: Sequence[Detections],
    categories: Categories,
    file: Path,
    *,
    min_score: float = 0.5,
) -> Path:
    """Write a PNG with a row for each image: truth, predictions, and the weights of its open edges, stage by stage.

    Args:
        detector: the detector; stages of its backbone with more than one block get a panel each.
        split: the images and the truth.
        found: the detections of the images to draw.
        categories: the classes.
        file: the PNG to write; it is replaced.
        min_score: draw predictions of at least this score, 0..1.

    Raises:
        MissingPackage: matplotlib is not installed; the message names the extra.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackage("pictures need matplotlib: pip install 'dg-timm[detect]'") from error
    body = detector.backbone.body
    stages = [name for name, stage in graph_stages(body).items() if len(stage.block_names) > 1]
    widths = [3.0, 3.0] + [1.6] * len(stages)
    figure = Figure(figsize=(sum(widths), 2.4 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(widths), width_ratios=widths, squeeze=False)
    colors = matplotlib.colormaps["tab10" if len(categories.names) <= 10 else "tab20"]
    for panels, one in zip(axes, found, strict=True):
        row = split.rows[one.row]
        image = read_image(split, one.row)
        names = [categories.names[label - 1] for label in row.labels]
        _draw_image(panels[0], image, f"truth, image {row.image_id}")
        _draw_boxes(panels[0], row.boxes, row.labels, names, colors)
        shown = one.scores >= min_score
        labels, scores = one.labels[shown], one.scores[shown]
        texts = [f"{categories.names[k - 1]} {score:.2f}" for k, score in zip(labels, scores, strict=True)]
        _draw_image(panels[1], image, f"predictions from {min_score:g}")
        _draw_boxes(panels[1], one.boxes[shown], labels, texts, colors)
        if stages:
            alphas = _adjacency_of(detector, image)
            for panel, name in zip(panels[2:], stages, strict=True):
                _draw_adjacency(figure, panel, name, alphas[name][0].float().cpu().numpy())
    FigureCanvasAgg(figure)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
    return file


def _draw_image(panel: Any, image: Any, title: str) -> None:
    panel.imshow(image)
    panel.set_title(title, fontsize=7)
    panel.axis("off")


def _draw_boxes(panel: Any, boxes: np.ndarray, labels: np.ndarray, texts: Sequence[str], colors: Any) -> None:
    from matplotlib.patches import Rectangle

    for (left, top, right, bottom), label, text in zip(boxes, labels, texts, strict=True):
        color = colors((int(label) - 1) % colors.N)
        panel.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=1))
        panel.text(left, top, text, fontsize=4, color="white", bbox=dict(facecolor=color, pad=0.5, linewidth=0))


def _adjacency_of(detector: Any, image: Any) -> Mapping[str, Tensor]:
    device = next(detector.parameters()).device
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).to(device) / 255
    return adjacency(detector.backbone.body, preprocess(detector, pixels))


def _draw_adjacency(figure: Any, panel: Any, name: str, alpha: np.ndarray) -> None:
    """Draw the matrix of one stage; the gray ground shows where there is no edge, or a closed one."""
    from matplotlib.ticker import MaxNLocator

    panel.set_facecolor("0.93")
    drawn = panel.imshow(np.ma.array(alpha, mask=alpha == 0), cmap="viridis", vmin=min(0.0, float(alpha.min())))
    panel.set_title(f"{name}, {int((alpha != 0).sum())} edges open", fontsize=6)
    panel.set_xlabel("target", fontsize=5)
    panel.set_ylabel("source", fontsize=5)
    panel.tick_params(labelsize=5)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(drawn, ax=panel, shrink=0.6).ax.tick_params(labelsize=5)
