"""Static networks that cost as little as one with gates does, by rules that look at no image."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from dg_timm.analysis.counting import count_costs
from dg_timm.graph.stage import graph_stages

Blocks = dict[str, list[int]]  # {stage: nodes, from 1}


def last_blocks(model: nn.Module, most: float, seed: int) -> Blocks:
    """Choose the last blocks of every stage, of one stage after the other, until a network costs ``most`` or less.

    Args:
        model: with gates; what has none is never chosen. It is not touched.
        most: cost relative to the static network.
        seed: ignored: there is nothing to draw.
    """
    stages = reversed(graph_stages(model).items())
    ranked = [(place, name, node) for name, stage in stages for place, node in enumerate(reversed(stage.gated_nodes))]
    return _take(model, [(name, node) for place, name, node in sorted(ranked, key=lambda one: one[0])], most)


def random_blocks(model: nn.Module, most: float, seed: int) -> Blocks:
    """Draw blocks until a network costs ``most`` or less; otherwise as :func:`last_blocks`."""
    all_blocks = [(name, node) for name, stage in graph_stages(model).items() for node in stage.gated_nodes]
    order = np.random.default_rng(seed).permutation(len(all_blocks))
    return _take(model, [all_blocks[k] for k in order], most)


# What a reduced network lacks, by the name of its kind
REDUCTIONS: dict[str, Callable[[nn.Module, float, int], Blocks]] = {"shallow": last_blocks, "random": random_blocks}


def _take(model: nn.Module, order: Sequence[tuple[str, int]], most: float) -> Blocks:
    costs, cost = count_costs(model), 1.0
    taken: Blocks = {}
    for name, node in order:
        if cost <= most:
            break
        taken.setdefault(name, []).append(node)
        cost -= costs.stages[name].blocks[node - 1] / costs.static_total
    return {name: sorted(nodes) for name, nodes in taken.items()}
