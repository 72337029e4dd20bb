"""A fixed topology: equal to the dense graph whose other edges are closed, and a plain network to any tool."""

import itertools

import pytest
import timm
import torch

import dg_timm
from dg_timm.graph.stage import graph_stages, routers
from tests.helpers.networks import QUICK_FAMILIES, gated_network, randomize, randomize_graph
from tests.helpers.stages import images, make_stage


def random_topology(nodes: int) -> torch.Tensor:
    """A path through about half of the nodes, and some more edges."""
    edges = (torch.rand(nodes, nodes) < 0.3).triu(1)
    path = [0, *[n for n in range(1, nodes - 1) if torch.rand(()) < 0.5], nodes - 1]
    for source, target in itertools.pairwise(path):
        edges[source, target] = True
    return edges


def useful(edges: torch.Tensor) -> torch.Tensor:
    """The edges on a way from input to output, by paths rather than by removing one node after another."""
    reach = torch.eye(len(edges)).bool()
    for _ in range(len(edges)):
        reach |= (reach.float() @ edges.float()) > 0
    alive = reach[0] & reach[:, -1]
    return edges & alive[:, None] & alive[None]


@torch.no_grad()
def mask(stage, edges):
    """Close every other edge in the dense graph: scale 0, at a threshold above it."""
    for node in range(len(stage) + 1):
        router = stage.get_submodule(f"router{node}")
        router.threshold.fill_(1e-9)
        router.scale.mul_(edges[node, router.targets])


@pytest.mark.parametrize("num_blocks", [1, 2, 6])
@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_equals_the_dense_graph_with_the_other_edges_closed(kind, num_blocks):
    for seed in range(4):
        torch.manual_seed(seed)
        stage, x = make_stage(kind, num_blocks), images(kind)
        edges = useful(random_topology(num_blocks + 2))
        mask(stage, edges)
        with torch.no_grad():
            wanted = stage(x)
            dg_timm.set_execution(stage, "fixed", {"": edges})
            torch.testing.assert_close(stage(x), wanted, rtol=1e-10, atol=1e-10)


def test_what_leads_nowhere_is_not_run():
    stage, x = make_stage("shortcut", 5), images("shortcut")
    edges = torch.zeros(7, 7).bool()
    edges[0, 2] = edges[2, 6] = True
    edges[0, 1] = edges[3, 6] = edges[4, 5] = True  # to a dead end, from one, and neither
    ran, convolved = [], []
    stage[0].conv1.register_forward_hook(lambda module, args, out: convolved.append(out))
    for name, module in stage.named_children():
        module.register_forward_hook(lambda module, args, out, name=name: ran.append(name))
    dg_timm.set_execution(stage, "fixed", {"": edges})
    with torch.no_grad():
        stage(x)
    assert ran == ["router0", "0", "1", "router2"]  # block 1 makes node 0's feature ...
    assert convolved == []  # ... and does nothing else


@pytest.mark.parametrize("name", QUICK_FAMILIES)
def test_it_scripts_exports_traces_and_trains(name):
    model = randomize(randomize_graph(timm.create_model(name, num_classes=4)))
    x = torch.randn(2, 3, 64, 64)
    topology = {key: useful(random_topology(len(stage.block_names) + 2)) for key, stage in graph_stages(model).items()}
    dg_timm.set_execution(model, "fixed", topology)
    with torch.no_grad():
        wanted = model(x)
        made_from = [torch.jit.script(model), torch.jit.trace(model, x), torch.export.export(model, (x,)).module()]
        if not name.startswith("dg_tf_"):  # padding like TensorFlow's looks at sizes, which fx can't follow
            made_from.append(torch.fx.symbolic_trace(model))
        for made in made_from:
            torch.testing.assert_close(made(x), wanted, rtol=1e-4, atol=1e-4)
    model.train()(x).sum().backward()
    learning = [key for key, parameter in model.named_parameters() if parameter.grad is not None]
    left_out = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert learning
    assert all(key.startswith(tuple(f"{stage}." for stage in topology)) for key in left_out)
    dg_timm.set_execution(model.eval(), "dense")
    assert not torch.equal(model(x), wanted)


def test_majority_topology_is_what_is_open_for_enough_images():
    model = randomize(randomize_graph(timm.create_model("dg_regnetx_002"), spread=20.0))
    dg_timm.set_threshold(model, 0.4)
    batches = [torch.randn(5, 3, 64, 64) * scale for scale in (0.2, 1.0, 4.0)]
    open_edges = {
        key: torch.cat([dg_timm.adjacency(model, batch)[key] for batch in batches]) != 0 for key in graph_stages(model)
    }
    sizes = []
    for share in (0, 0.2, 0.5, 1):
        found = dg_timm.majority_topology(model, batches, share)
        for key, topology in found.items():
            assert torch.equal(topology, (open_edges[key].double().mean(0) >= share) & open_edges[key].any(0))
        sizes.append(sum(int(w.sum()) for w in found.values()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_its_cost_is_that_of_the_topology():
    model = timm.create_model("dg_resnet50")
    x = torch.randn(2, 3, 64, 64)
    everything = dg_timm.cost(model, x)
    chain = {key: torch.ones(len(s) + 1).diag(1).bool() for key, s in graph_stages(model).items()}
    dg_timm.set_execution(model, "fixed", chain)
    along = dg_timm.cost(model, x)
    assert (along < everything).all()
    assert along[0] == along[1]
    past = {key: torch.zeros_like(topology) for key, topology in chain.items()}
    for topology in past.values():
        topology[0, -1] = True
    dg_timm.set_execution(model, "fixed", past)
    assert (dg_timm.cost(model, x) < 0.3).all()
    dg_timm.set_execution(model, "dense")
    assert torch.equal(dg_timm.cost(model, x), everything)


def test_identity_along_the_chain_is_the_static_network():
    static = randomize(timm.create_model("resnet18", num_classes=3))
    wanted = static(x := torch.randn(2, 3, 64, 64))
    model = dg_timm.dynamize(static)
    chain = {key: torch.ones(len(s) + 1).diag(1).bool() for key, s in graph_stages(model).items()}
    dg_timm.set_execution(model, "fixed", chain)
    assert torch.equal(model(x), wanted)


def test_bad_topologies_change_nothing():
    model = timm.create_model("dg_resnet18").eval()
    complete = {key: torch.ones(4, 4).triu(1).bool() for key in graph_stages(model)}
    broken = {
        "has no way from its input to its output": torch.zeros(4, 4).bool(),
        r"must be a \(4, 4\) bool tensor, got \(3, 3\)": torch.zeros(3, 3).bool(),
        "bool tensor, got .* torch.float32": torch.ones(4, 4).triu(1),
        "strictly upper triangular": torch.ones(4, 4).bool(),
        "bool tensor, got list": [[True]],
    }
    for message, topology in broken.items():
        with pytest.raises(ValueError, match=message):
            dg_timm.set_execution(model, "fixed", {**complete, "layer3": topology})
    with pytest.raises(ValueError, match="a topology for the stages layer1, layer2"):
        dg_timm.set_execution(model, "fixed", {"layer1": complete["layer1"]})
    with pytest.raises(ValueError, match="fixed execution needs a topology"):
        dg_timm.set_execution(model, "fixed")
    with pytest.raises(ValueError, match="dense execution takes no topology"):
        dg_timm.set_execution(model, "dense", complete)
    with pytest.raises(ValueError, match="no images"):
        dg_timm.majority_topology(model, [])
    with pytest.raises(ValueError, match="share must be a number from 0 to 1, got 2"):
        dg_timm.majority_topology(model, [torch.randn(1, 3, 64, 64)], 2)
    assert {stage.execution for stage in graph_stages(model).values()} == {"dense"}
    assert all(stage.topology == [[], [0], [0, 1], [0, 1, 2]] for stage in graph_stages(model).values())
    assert len(routers(model)) == 12


def test_fixed_execution_of_all_edges_is_dense_execution_with_gates():
    """An edge past a skipped node belongs to the image, not to the topology."""
    model, images = gated_network()
    with torch.no_grad():
        wanted = model(images)
        dg_timm.set_execution(model, "fixed", dg_timm.majority_topology(model, [images], share=0.0))
        torch.testing.assert_close(model(images), wanted)
