"""Paths that are imposed on a network in place of what its routers choose."""

import pytest
import timm
import torch

import dg_timm
from dg_timm.benchmarks.imposed import ImposedModel, ImposedPaths, complete_topology, open_all_edges
from dg_timm.benchmarks.setting import Setting
from dg_timm.benchmarks.times import measure_times
from dg_timm.execution import chunking
from dg_timm.graph.stage import graph_stages


@pytest.fixture
def model():
    model = timm.create_model("dg_resnet18").eval()
    open_all_edges(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("execution", ["sparse", "fixed"])
def test_every_execution_runs_the_imposed_paths(model, execution):
    images = torch.randn(5, 3, 64, 64)
    imposed = ImposedModel(model, execution, (3, 64, 64))
    cost = imposed.draw(5, 0.5)
    found = model(images)
    dg_timm.set_execution(model, "dense")
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)
    alphas = dg_timm.adjacency(model, images)
    for name, paths in imposed.paths.items():
        assert torch.equal(alphas[name], paths.alpha)
        assert ((alphas[name] != 0).sum(2) <= 1).all()  # one edge leaves a node
        assert (alphas[name][:, 0] != 0).sum() == 5
    assert cost == pytest.approx(dg_timm.cost(model, images).mean().item())
    assert 0.3 < cost < 0.9
    same = [bool((paths.alpha == paths.alpha[0]).all()) for paths in imposed.paths.values()]
    assert all(same) == (execution == "fixed")


@torch.no_grad()
@pytest.mark.parametrize("execution", ["sparse", "fixed"])
def test_imposed_paths_follow_the_chunks_of_a_batch(model, execution, monkeypatch):
    images = torch.randn(7, 3, 64, 64)
    imposed = ImposedModel(model, execution, (3, 64, 64))
    imposed.draw(7, 0.5)
    expected = model(images)
    calls = []
    cut = chunking.run_chunks
    monkeypatch.setattr(chunking, "num_chunks", lambda stage, x: 3)
    monkeypatch.setattr(chunking, "is_exact", lambda *_: True)
    monkeypatch.setattr(chunking, "run_chunks", lambda run, x, chunks: calls.append(chunks) or cut(run, x, chunks))
    for _ in range(2):  # the next batch begins with the first image again
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert calls == [3] * 8  # the comparison would be empty otherwise


@pytest.mark.parametrize(("removed", "kept"), [(0.0, 2), (1.0, 0)])
def test_a_path_leaves_out_the_share_that_was_asked_for(model, removed, kept):
    stage = graph_stages(model)["layer1"]
    alpha = ImposedPaths(stage).draw(4, removed)
    assert ((alpha != 0).sum((1, 2)) == kept + 1).all()
    assert ((alpha == 0) | ((alpha >= 0.5) & (alpha < 1.5))).all()


def test_the_complete_topology_has_the_edges_that_exist():
    model = timm.create_model("dg_cifar_resnet26", topology="ws").eval()
    topology = complete_topology(model)
    for name, stage in graph_stages(model).items():
        assert [topology[name][:, node].nonzero().flatten().tolist() for node in range(len(stage.edges))] == stage.edges
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        dg_timm.set_execution(model, "fixed", topology)
        assert torch.equal(model(images), expected)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["dg_resnet18", "dg_resnet18:sparse", "dg_resnet18:fixed"])
def test_the_cost_of_paths_is_a_column_of_those_that_run_them(spec):
    setting = Setting("inference", batch_size=7, image_size=64, removed=0.5)
    (row,) = measure_times([spec if ":" in spec else f"{spec}:sparse"], setting, 3)
    assert 0.3 < row["cost"] < 0.9
    assert "limit" not in row
