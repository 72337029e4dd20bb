"""Draw the wiring of images: one row an image, one panel a stage."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from dg_timm._errors import BadValue, MissingPackage
from dg_timm._files import atomic_path

_INCHES_A_NODE = 0.6
_INCHES_A_ROW = 1.5
_INCHES_OF_IMAGE = 1.2
_NODE_AREA = 60  # square points
_DOTS_AN_INCH = 120
_MOST_WEIGHT = 1.5  # an arc does not get wider beyond it


def draw_wiring(
    adjacency: Mapping[str, Tensor],
    path: Union[str, os.PathLike[str]],
    *,
    images: Optional[Tensor] = None,
    titles: Optional[Sequence[str]] = None,
) -> Path:
    """Write a PNG of the graphs that :func:`dg_timm.adjacency` returned.

    Nodes lie on a line in topological order (squares are input and output). An arc is an edge. Its width is the size of
    the edge's weight. Its color is the difference from the mean weight of that edge over the images drawn, so that what
    is *dynamic* stands out: red is more than for the others, blue less. A closed edge is not drawn, and a block that
    does not run for the image, because it is skipped or removed, is hollow.

    Args:
        adjacency: ``{stage: (batch, N, N)}``; stages of a single block are left out where there are larger ones.
        path: the file to write; its folder is made if missing.
        images: (batch, channels, height, width) with 1 or 3 channels and any range, shown at the left of each row.
        titles: one title for each image.

    Returns:
        the path.

    Raises:
        MissingPackage: if matplotlib or networkx is missing; the message names the extra.
        BadValue: if there is nothing to draw, ``path`` is not that of a PNG file, or the numbers of images, titles and
            adjacency matrices differ.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_cifar_resnet26.cifar10", pretrained=True)
    >>> images = torch.zeros(2, 3, 32, 32)
    >>> str(dg_timm.draw_wiring(dg_timm.adjacency(model, images), "wiring.png", images=images))
    'wiring.png'
    """
    try:
        import networkx  # noqa: F401  (used below)
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackage("drawing needs matplotlib and networkx: pip install 'dg-timm[plots]'") from error
    stages = _drawn_stages(adjacency)
    rows = _number_of_rows(stages, images, titles)
    if Path(path).suffix.lower() != ".png":
        raise BadValue(f"the picture is a PNG file, got {path}; give a name that ends in .png")
    widths = [_INCHES_OF_IMAGE] + [_INCHES_A_NODE * alpha.shape[1] for alpha in stages.values()]
    figure = Figure(figsize=(sum(widths), _INCHES_A_ROW * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(widths), width_ratios=widths, squeeze=False)
    for row in range(rows):
        _show_image(axes[row][0], None if images is None else images[row], None if titles is None else titles[row])
        for panel, (name, alpha) in zip(axes[row][1:], stages.items(), strict=True):
            difference = alpha - alpha.mean(0)
            most = difference.abs().max().clamp(min=1e-6)
            _draw_graph(panel, alpha[row], difference[row] / most)
            if row == 0:
                panel.set_title(f"{name} (edges vary by up to {float(most):.2f})", fontsize=8)
    path = Path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DOTS_AN_INCH)
    return path


def _drawn_stages(adjacency: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not adjacency:
        raise BadValue("there is no adjacency to draw; pass what dg_timm.adjacency(model, images) returns")
    largest = max(alpha.shape[1] for alpha in adjacency.values())
    return {name: alpha.float().cpu() for name, alpha in adjacency.items() if alpha.shape[1] > 3 or largest == 3}


def _number_of_rows(stages: Mapping[str, Tensor], images: Optional[Tensor], titles: Optional[Sequence[str]]) -> int:
    rows = len(next(iter(stages.values())))
    for what, given in (("images", images), ("titles", titles)):
        if given is not None and len(given) != rows:
            raise BadValue(f"{len(given)} {what} for {rows} adjacency matrices; give one for each")
    return rows


def _show_image(panel: Any, image: Optional[Tensor], title: Optional[str]) -> None:
    panel.axis("off")
    if image is not None:
        shown = image.float().cpu()
        shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp(min=1e-6)
        panel.imshow(shown.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
    if title is not None:
        panel.set_title(title, fontsize=8)


def _draw_graph(panel: Any, alpha: Tensor, difference: Tensor) -> None:
    """Draw the graph of one image in one stage.

    Args:
        panel: axes of matplotlib.
        alpha: (N, N), the weights of the edges.
        difference: (N, N), from -1 to 1, how far each weight lies from its mean over the images.
    """
    import matplotlib
    import networkx as nx

    colors = matplotlib.colormaps["coolwarm"]
    last = alpha.shape[0] - 1
    graph = nx.DiGraph()
    graph.add_nodes_from(range(last + 1))
    graph.add_edges_from(torch.nonzero(alpha).tolist())
    position = {node: (node, 0.0) for node in graph}
    runs = [node for node in range(1, last) if alpha[:, node].any()]
    skipped = [node for node in range(1, last) if node not in runs]
    for nodes, shape, color in (([0, last], "s", "0.25"), (runs, "o", "0.25"), (skipped, "o", "white")):
        nx.draw_networkx_nodes(graph, position, nodes, _NODE_AREA, color, shape, edgecolors="0.25", ax=panel)
    for along, bend in ((True, 0.0), (False, -0.45)):  # the chain is straight, every other edge an arc
        edges = [(i, j) for i, j in graph.edges if (j == i + 1) == along]
        nx.draw_networkx_edges(
            graph,
            position,
            edges,
            width=[0.3 + 2.5 * min(abs(float(alpha[i, j])), _MOST_WEIGHT) for i, j in edges],
            edge_color=[colors(0.5 + 0.5 * float(difference[i, j])) for i, j in edges],
            arrowsize=5,
            node_size=_NODE_AREA,
            connectionstyle=f"arc3,rad={bend}",
            ax=panel,
        )
    panel.set_xlim(-0.5, last + 0.5)
    panel.set_ylim(-0.3, 0.26 * last + 0.3)
    panel.axis("off")
