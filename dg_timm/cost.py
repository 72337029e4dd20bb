"""What a dynamic graph network has to compute for an image, given which edges are open (paper 3.4).

A node all of whose input edges are closed is not run, and a closed edge is not read. Everything else is: stem, head,
entry blocks, node 0's projection and the routers (whose C x out-degree multiply-adds a node are left out, as in Table
1).
"""

from typing import Optional

import torch
from torch import Tensor, nn

from dg_timm.checkpoint import graph_stages
from dg_timm.introspect import adjacency
from dg_timm.stage import DGStage
from dg_timm.stages import run_on_meta

_LAYERS = (nn.Conv2d, nn.Linear)


@torch.no_grad()
def cost(model: nn.Module, images: Tensor) -> Tensor:
    """(batch,) float64: multiply-adds run for each image, relative to the static network's.

    Counted are convolutions, linear layers, and one multiply-add an element that an open edge reads. A network with
    every edge open costs a little more than 1.

    Args:
        model: a dynamic graph network; run in eval mode and left as it was.
        images: (batch, channels, height, width).

    Raises:
        ValueError: if the model is static, or the images have the wrong rank or channels.
    """
    return relative_cost(model, adjacency(model, images), (images.shape[1], images.shape[2], images.shape[3]))


def relative_cost(
    model: nn.Module, alphas: dict[str, Tensor], input_size: Optional[tuple[int, int, int]] = None
) -> Tensor:
    """As :func:`cost`, for adjacencies that are known already ({stage: (batch, N, N)})."""
    layers: dict[str, int] = {}
    maps: dict[str, tuple[int, int]] = {}  # of a stage: elements of its input, and of a node's feature
    names = {module: name for name, module in model.named_modules()}
    stages = graph_stages(model)

    def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        if isinstance(module, _LAYERS):
            weight = module.weight[0].numel()
            layers[names[module]] = layers.get(names[module], 0) + out[0].numel() * weight
        elif names.get(module) in stages:
            maps[names[module]] = (args[0][0].numel(), out[0].numel())

    run_on_meta(model, count, input_size)
    routers_and_projections = {
        f"{stage}.{added}." for stage, graph in stages.items() for added in graph.graph_modules()
    }
    added = {name: macs for name, macs in layers.items() if name.startswith(tuple(routers_and_projections))}
    static = sum(layers.values()) - sum(added.values())
    projections = sum(macs for name, macs in added.items() if ".projection." in f".{name}")
    some = next(iter(alphas.values()))
    run = torch.full((some.shape[0],), float(static + projections), dtype=torch.float64, device=some.device)
    for name, graph in stages.items():
        is_open = alphas[name] != 0
        source, feature = maps[name]
        for node, block in enumerate(graph.block_names, start=1):
            prefix = f"{name}.{block}."
            own = sum(
                m
                for n, m in layers.items()
                if n.startswith(prefix) and not _is_ready_shortcut(graph, node, n[len(prefix) :])
            )
            run -= own * (~is_open[:, :node, node].any(1)).double()
        n = alphas[name].shape[-1]
        others = n * (n - 1) // 2 - 1
        first = (
            graph.edge_reads(source, feature) - others * feature
        )  # (0, 1) reads the stage's input, before its stride
        run += first * is_open[:, 0, 1] + feature * (is_open.sum((1, 2)) - is_open[:, 0, 1].long())
    return run / static


def _is_ready_shortcut(graph: DGStage, node: int, layer: str) -> bool:
    """Block 1's own downsampling feeds node 0 and runs whether block 1 does or not."""
    if node != 1 or not layer.startswith("downsample."):
        return False
    return hasattr(graph.get_submodule(graph.block_names[0]), "projects_shortcut")
