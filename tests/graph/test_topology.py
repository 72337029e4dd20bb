"""Random topologies (Table 4): drawn anew the same, acyclic, connected; everything that runs a graph runs them."""

import json
import sys

import networkx as nx
import pytest
import timm
import torch

import dg_timm
from dg_timm.graph.stage import graph_stages, routers
from dg_timm.graph.topology import GENERATORS, complete, random_topology
from tests.helpers.networks import randomize, randomize_graph

NAME = "dg_cifar_resnet26"
SIZE = (3, 32, 32)


def with_topology(topology, **options):
    return randomize_graph(randomize(timm.create_model(NAME, topology=topology, **options))).eval()


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 6, 12, 32])
def test_every_block_lies_on_a_way_from_input_to_output(kind, blocks):
    for seed in range(5):
        sources = random_topology(kind, blocks, seed)
        assert sources == random_topology(kind, blocks, seed)
        assert len(sources) == blocks + 2
        edges = nx.DiGraph((source, target) for target, of_node in enumerate(sources) for source in of_node)
        assert all(source < target for source, target in edges.edges)
        assert nx.ancestors(edges, blocks + 1) == set(range(blocks + 1))
        assert nx.descendants(edges, 0) == set(range(1, blocks + 2))


@pytest.mark.parametrize(("kind", "low", "high"), [("er", 70, 130), ("ba", 135, 135), ("ws", 64, 64)])
def test_generators_have_the_edges_of_their_parameters(kind, low, high):
    """Of 32 nodes: ER 0.2 * 496 on average, BA 5 * 27, WS 4 * 32 / 2; besides those of input and output."""
    for seed in range(5):
        inner = [s for of_node in random_topology(kind, 32, seed)[:-1] for s in of_node if s > 0]
        assert low <= len(inner) <= high
    assert random_topology(kind, 32, 0) != random_topology(kind, 32, 1)


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("instance_aware", [True, False])
def test_all_executions_agree_with_the_complete_graph_of_the_same_weights(kind, instance_aware):
    """The reference: a complete graph whose edges outside the topology weigh 0."""
    model = with_topology(kind, topology_seed=3, instance_aware=instance_aware)
    complete = timm.create_model(NAME, instance_aware=instance_aware).eval()
    state = complete.state_dict()
    state |= {key: value for key, value in model.state_dict().items() if ".router" not in key}
    complete.load_state_dict(state)
    with torch.no_grad():
        for (name, router), ours in zip(routers(complete).items(), routers(model).values(), strict=True):
            router.scale.zero_()
            rows = [target - ours.node - 1 for target in ours.targets]
            router.scale[rows] = ours.scale
            for key, value in router.named_parameters():
                if key.startswith(("fc", "logits")):
                    value[rows] = ours.get_parameter(key)
            router.threshold.copy_(ours.threshold)
            assert name
    x = torch.randn(3, *SIZE)
    wanted = complete(x)
    assert torch.allclose(model(x), wanted, atol=1e-4)
    for stage, alpha in dg_timm.adjacency(model, x).items():
        assert torch.allclose(alpha, dg_timm.adjacency(complete, x)[stage], atol=1e-5)
        assert {(s, t) for _, s, t in alpha.nonzero().tolist()} <= {
            (s, t) for t, of_node in enumerate(graph_stages(model)[stage].edges) for s in of_node
        }
    dg_timm.set_execution(model, "sparse")
    assert torch.allclose(model(x), wanted, atol=1e-4)
    dg_timm.set_execution(model, "dense")
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), wanted, atol=1e-4)
    dg_timm.set_threshold(model, 0.0)  # else so few edges may close a stage for all images
    wanted = model(x)
    dg_timm.set_execution(model, "fixed", dg_timm.majority_topology(model, [x]))
    assert torch.allclose(model(x), wanted, atol=1e-4)
    dg_timm.set_execution(model, "dense")
    dg_timm.set_threshold(model, None)
    ours, theirs = dg_timm.cost(model, x), dg_timm.cost(complete, x)
    assert torch.allclose(ours, theirs, atol=2e-3)  # the complete graph's routers are larger
    assert dg_timm.complexity(model).aggregation < dg_timm.complexity(complete).aggregation


def test_a_fresh_network_starts_from_the_mean_of_the_predecessors_that_there_are():
    model = timm.create_model(NAME, topology="er").eval()
    for stage, alpha in dg_timm.adjacency(model, torch.randn(1, *SIZE)).items():
        assert torch.allclose(alpha[0].sum(0)[1:], torch.ones(len(graph_stages(model)[stage].edges) - 1))


def test_every_parameter_learns():
    model = timm.create_model(NAME, topology="ws").train()
    model(torch.randn(2, *SIZE)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(router.fc.weight.grad.any() for router in routers(model).values())


def test_the_topology_is_saved_as_edges_and_loads_without_networkx(tmp_path, monkeypatch):
    model = with_topology("ws", topology_seed=5)
    dg_timm.save_pretrained(model, tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_args"]
    assert kept["topology"] == {name: stage.edges for name, stage in graph_stages(model).items()}
    assert kept["topology_seed"] == 5
    monkeypatch.setitem(sys.modules, "networkx", None)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, *SIZE)
    assert torch.equal(again(x), model(x))
    with pytest.raises(ImportError, match=r"random topologies need networkx: pip install 'dg-timm\[plots\]'"):
        timm.create_model(NAME, topology="ws")


def test_seeds_and_stages_draw_their_own():
    a, b, c = (timm.create_model("dg_resnet101", topology="ws", topology_seed=s, device="meta") for s in (0, 0, 1))
    edges = [{name: stage.edges for name, stage in graph_stages(m).items()} for m in (a, b, c)]
    assert edges[0] == edges[1] != edges[2]
    small = timm.create_model(NAME, topology="er", topology_seed=0, device="meta")
    assert len({str(stage.edges) for stage in graph_stages(small).values()}) > 1


FINE = [[], [0], [0, 1], [1, 2], [3], [2, 4]]


@pytest.mark.parametrize(
    ("topology", "seed", "error", "message"),
    [
        ("sw", 0, ValueError, "topology must be one of complete, er, ba, ws, got 'sw'"),
        (3, 0, TypeError, "topology must be one of complete, er, ba, ws, or the sources"),
        ("er", -1, ValueError, "topology_seed must be at least 0, got -1"),
        ("er", 1.5, TypeError, r"topology_seed must be an integer, got 1\.5"),
        ("er", True, TypeError, "topology_seed must be an integer, got True"),
        ({"layer1": FINE}, 0, ValueError, "of the stages layer1, layer2, layer3 is needed, got one of layer1"),
        (FINE[:5], 0, TypeError, "topology must be one of"),
        ([*FINE[:3], [1, 2]], 0, None, r"must have 6 nodes \(input, blocks, output\), got 4"),
        ([[], [0], [0, 1], [2, 1], [3], [2, 4]], 0, None, "sources of node 3 must ascend, from 0 on, below 3"),
        ([[], [0], [0, 2], [1, 2], [3], [2, 4]], 0, None, "sources of node 2 must ascend"),
        ([[], [0], [], [1], [3], [4]], 0, None, "node 2 has no source"),
        ([[], [0], [1], [1], [3], [4]], 0, None, "node 2 leads nowhere"),
        ("abc", 0, ValueError, "topology must be one of"),
        ([[], ["x"]], 0, None, "must list the sources of every node"),
    ],
)
def test_what_is_no_topology_is_refused(topology, seed, error, message):
    if error is None:  # of one stage; the others are fine
        topology, error = {"layer1": topology, "layer2": FINE, "layer3": FINE}, ValueError
    with pytest.raises(error, match=message):
        timm.create_model(NAME, topology=topology, topology_seed=seed)


def test_a_random_topology_has_no_identity():
    static = timm.create_model("cifar_resnet26")
    with pytest.raises(ValueError, match="identity conversion needs the complete topology, got 'er'"):
        dg_timm.dynamize(static, topology="er")
    assert not graph_stages(static)
    with pytest.raises(ValueError, match="a random topology: such a network is another function"):
        timm.create_model(NAME, topology="er").load_state_dict(static.state_dict())


def test_fixed_execution_takes_only_edges_that_there_are():
    model = with_topology("ba")
    topology = {name: torch.ones(6, 6).triu(1).bool() for name in graph_stages(model)}
    with pytest.raises(ValueError, match=r"the topology of 'layer1' has an edge \(0, 4\), which the network lacks"):
        dg_timm.set_execution(model, "fixed", topology)
    x = torch.randn(1, *SIZE)
    before = model(x)
    assert graph_stages(model)["layer1"].topology == graph_stages(model)["layer1"].edges
    dg_timm.set_execution(model, "sparse")
    dg_timm.set_execution(model, "dense")
    assert torch.equal(model(x), before)


def test_an_explicit_topology_may_be_the_complete_one():
    sources = {f"layer{k}": complete(4) for k in (1, 2, 3)}
    model = timm.create_model(NAME, topology=sources)
    assert all(stage.is_complete() for stage in graph_stages(model).values())
    model.load_state_dict(timm.create_model("cifar_resnet26").state_dict())  # as the identity
