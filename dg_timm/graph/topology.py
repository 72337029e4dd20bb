"""Which edges a stage has: complete, random (paper Table 4), or given. A topology lists the sources of every node.

Random ones follow the RandWire paper (Xie et al., 2019, 3.2). A generator draws an undirected graph over the blocks.
An edge points from the lower to the higher index, so that there is no cycle. A block that nothing leads to reads the
stage's input, and one that leads nowhere goes to its output.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from dg_timm._errors import BadType, BadValue, MissingPackage

# "complete", the name of a generator, or the sources of every node by stage
Topology = Union[str, Mapping[str, Sequence[Sequence[int]]]]

# Parameters of Table 4. Stages may have fewer blocks than these need; there, as many edges as can be.
GENERATORS: dict[str, Callable[[Any, int, int], Any]] = {
    "er": lambda nx, blocks, seed: nx.erdos_renyi_graph(blocks, 0.2, seed=seed),
    "ba": lambda nx, blocks, seed: nx.barabasi_albert_graph(
        blocks, min(5, blocks - 1), seed=seed, initial_graph=_unconnected(nx, min(5, blocks - 1))
    ),
    "ws": lambda nx, blocks, seed: nx.watts_strogatz_graph(blocks, min(4, blocks - 1), 0.75, seed=seed),
}
TOPOLOGIES = ("complete", *GENERATORS)


def complete(num_blocks: int) -> list[list[int]]:
    """The sources of every node of the complete graph: ``[[], [0], [0, 1], ...]``."""
    return [list(range(target)) for target in range(num_blocks + 2)]


def _unconnected(nx: Any, count: int) -> Any:
    """The start of the RandWire paper: nodes without edges, all of which the next one is connected to."""
    start = nx.empty_graph(count + 1)
    start.add_edges_from((node, count) for node in range(count))
    return start


def build_topology(stages: Mapping[str, int], topology: Topology, seed: int) -> dict[str, list[list[int]]]:
    """Give the topology of every stage.

    Args:
        stages: {stage name: number of blocks}.
        topology: ``complete``, a generator's name, or the sources of every node by stage.
        seed: of a random topology; every stage draws its own.

    Returns:
        {stage name: sources of every node}.

    Raises:
        BadType: if the seed is no integer, or the topology neither a name nor a mapping.
        BadValue: for an unknown name, a negative seed, or edges that are no topology of these stages.
        MissingPackage: if networkx is missing.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BadType(f"topology_seed must be an integer, got {seed!r}")
    if seed < 0:
        raise BadValue(f"topology_seed must be at least 0, got {seed}")
    if isinstance(topology, Mapping):
        if topology.keys() != stages.keys():
            raise BadValue(f"a topology of the stages {', '.join(stages)} is needed, got one of {', '.join(topology)}")
        return {name: _checked(name, topology[name], blocks) for name, blocks in stages.items()}
    if not isinstance(topology, str):
        raise BadType(
            f"topology must be one of {', '.join(TOPOLOGIES)}, or the sources of every node by stage: {topology!r}"
        )
    if topology not in TOPOLOGIES:
        raise BadValue(f"topology must be one of {', '.join(TOPOLOGIES)}, got {topology!r}")
    if topology == "complete":
        return {name: complete(blocks) for name, blocks in stages.items()}
    return {
        name: random_topology(topology, blocks, int(np.random.SeedSequence((seed, k)).generate_state(1)[0]))
        for k, (name, blocks) in enumerate(stages.items())
    }


def random_topology(kind: str, num_blocks: int, seed: int) -> list[list[int]]:
    """Draw the sources of every node (input, blocks, output); every block lies on a way from input to output.

    Args:
        kind: ``er`` (Erdos-Renyi, P = 0.2), ``ba`` (Barabasi-Albert, M = 5) or ``ws`` (Watts-Strogatz, K = 4,
            P = 0.75).
    """
    try:
        import networkx as nx
    except ImportError as error:
        raise MissingPackage("random topologies need networkx: pip install 'dg-timm[plots]'") from error
    pairs: set[tuple[int, int]] = set()
    if num_blocks > 1:  # node k of the generator is block k + 1
        drawn = GENERATORS[kind](nx, num_blocks, seed)
        pairs = {(min(edge) + 1, max(edge) + 1) for edge in drawn.edges if edge[0] != edge[1]}
    output = num_blocks + 1
    for block in range(1, output):
        if not any(target == block for _, target in pairs):
            pairs.add((0, block))
    for block in range(1, output):
        if not any(source == block for source, _ in pairs):
            pairs.add((block, output))
    return [sorted(source for source, to in pairs if to == target) for target in range(output + 1)]


def useful_edges(name: str, chosen: Any, existing: list[list[int]]) -> list[list[int]]:
    """Turn a matrix of edges into a topology, less the edges that lie on no way from input to output.

    Args:
        name: of the stage, for errors.
        chosen: (N, N) bool, [source, target], strictly upper triangular.
        existing: the stage's own topology.

    Raises:
        BadValue: if the matrix does not fit, has an edge that the stage lacks, or no way from input to output.
    """
    nodes = len(existing)
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != (nodes, nodes):
        what = f"{tuple(chosen.shape)} {chosen.dtype}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise BadValue(f"the topology of '{name}' must be a ({nodes}, {nodes}) bool tensor, got {what}")
    edges = chosen.cpu().triu(1)
    if not torch.equal(edges, chosen.cpu()):
        raise BadValue(f"the topology of '{name}' must be strictly upper triangular: [source, target], source < target")
    for source, target in edges.nonzero().tolist():
        if source not in existing[target]:
            raise BadValue(f"the topology of '{name}' has an edge ({source}, {target}), which the network lacks")
    for node in range(1, nodes - 1):  # in order: what removes one node may remove the next
        edges[node] &= edges[:, node].any()
    for node in range(nodes - 2, 0, -1):
        edges[:, node] &= edges[node].any()
    if not edges[:, -1].any():
        raise BadValue(f"the topology of '{name}' has no way from its input to its output")
    return [edges[:, target].nonzero().flatten().tolist() for target in range(nodes)]


def _checked(name: str, sources: Any, blocks: int) -> list[list[int]]:
    nodes = blocks + 2
    try:
        topology = [[int(source) for source in of_node] for of_node in sources]
    except (TypeError, ValueError):
        raise BadValue(f"the topology of '{name}' must list the sources of every node, got {sources!r}") from None
    if len(topology) != nodes:
        raise BadValue(f"the topology of '{name}' must have {nodes} nodes (input, blocks, output), got {len(topology)}")
    for target, of_node in enumerate(topology):
        if of_node != sorted(set(of_node)) or any(not 0 <= source < target for source in of_node):
            raise BadValue(f"the topology of '{name}': sources of node {target} must ascend, from 0 on, below {target}")
        if target > 0 and not of_node:
            raise BadValue(f"the topology of '{name}': node {target} has no source")
    for source in range(nodes - 1):
        if not any(source in of_node for of_node in topology):
            raise BadValue(f"the topology of '{name}': node {source} leads nowhere")
    return topology
