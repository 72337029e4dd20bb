"""Draw the wiring of images: one row an image, one panel a stage."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

_EXTRA = "drawing needs matplotlib and networkx: pip install 'dg-timm[plots]'"


def draw_wiring(
    adjacency: Mapping[str, Tensor],
    path: Union[str, os.PathLike[str]],
    *,
    images: Optional[Tensor] = None,
    titles: Optional[Sequence[str]] = None,
) -> Path:
    """Write a PNG of the graphs that :func:`dg_timm.adjacency` returned.

    Nodes lie on a line in topological order (square: input and output). An arc is an edge; its width is |weight| and
    its colour the difference from the mean weight of that edge over the images drawn, so that what is *dynamic* stands
    out: red is more than the others, blue less. A closed edge is not drawn.

    Args:
        adjacency: ``{stage: (batch, N, N)}``; stages of a single block are left out where there are larger ones.
        images: (batch, channels, height, width), any range, shown at the left of each row.
        titles: one for each image.

    Raises:
        ImportError: if matplotlib or networkx is missing; the message names the extra.
        ValueError: if the numbers of images, titles and adjacency matrices differ.
    """
    try:
        import matplotlib
        import networkx as nx
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    if not adjacency:
        raise ValueError("there is no adjacency to draw; pass what dg_timm.adjacency(model, images) returns")
    largest = max(alpha.shape[1] for alpha in adjacency.values())
    stages = {name: alpha.float().cpu() for name, alpha in adjacency.items() if alpha.shape[1] > 3 or largest == 3}
    rows = len(next(iter(stages.values())))
    for what, given in (("images", images), ("titles", titles)):
        if given is not None and len(given) != rows:
            raise ValueError(f"{len(given)} {what} for {rows} adjacency matrices; give one for each")

    widths = [1.2] + [0.6 * alpha.shape[1] for alpha in stages.values()]
    figure = Figure(figsize=(sum(widths), 1.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(widths), width_ratios=widths, squeeze=False)
    colours = matplotlib.colormaps["coolwarm"]
    for row in range(rows):
        panel: Any = axes[row][0]
        panel.axis("off")
        if images is not None:
            shown = images[row].float().cpu()
            shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp(min=1e-6)
            panel.imshow(shown.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
        if titles is not None:
            panel.set_title(titles[row], fontsize=8)
        for panel, (name, alpha) in zip(axes[row][1:], stages.items(), strict=True):
            spread = (alpha - alpha.mean(0)).abs().max().clamp(min=1e-6)
            difference = (alpha[row] - alpha.mean(0)) / spread
            graph = nx.DiGraph()
            graph.add_nodes_from(range(alpha.shape[1]))
            graph.add_edges_from(torch.nonzero(alpha[row]).tolist())
            position = {node: (node, 0.0) for node in graph}
            last = alpha.shape[1] - 1
            for nodes, shape in (([0, last], "s"), (list(range(1, last)), "o")):
                nx.draw_networkx_nodes(graph, position, nodes, 60, "0.25", shape, ax=panel)
            for along, bend in ((True, 0.0), (False, -0.45)):  # the chain is straight, every other edge an arc
                edges = [(i, j) for i, j in graph.edges if (j == i + 1) == along]
                nx.draw_networkx_edges(
                    graph,
                    position,
                    edges,
                    width=[0.3 + 2.5 * min(abs(float(alpha[row, i, j])), 1.5) for i, j in edges],
                    edge_color=[colours(0.5 + 0.5 * float(difference[i, j])) for i, j in edges],
                    arrowsize=5,
                    node_size=60,
                    connectionstyle=f"arc3,rad={bend}",
                    ax=panel,
                )
            panel.set_xlim(-0.5, last + 0.5)
            panel.set_ylim(-0.3, 0.26 * last + 0.3)
            panel.axis("off")
            if row == 0:
                panel.set_title(f"{name} (edges vary by up to {float(spread):.2f})", fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, format="png", dpi=120)
    os.replace(beside, path)
    return path
