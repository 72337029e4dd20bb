"""Sharded and replicated training: FSDP2 by root, stage, block and layer; DDP over fixed execution. gloo, processes."""

import sys

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import dg_timm
from dg_timm.graph.stage import graph_stages, routers
from tests.helpers.networks import randomize, randomize_graph

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_gloo_available(), reason="needs gloo")
SMALL = ("dg_resnet18", "dg_mobilenetv2_050")
IMAGES = (4, 3, 64, 64)


def network(name):
    """The same on every process: random routers; norms in eval mode, so that no process has statistics of its own."""
    torch.manual_seed(0)
    model = randomize_graph(randomize(timm.create_model(name, num_classes=5)), spread=0.3)
    images, labels = torch.randn(IMAGES), torch.arange(IMAGES[0]) % 5
    return model, images, labels


def gradients(model):
    return {key: p.grad.detach().clone() for key, p in model.named_parameters() if p.grad is not None}


def units(model, by):
    """What is sharded on its own, apart from the root: stages, blocks (entry ones too), or linear layers."""
    stages = graph_stages(model).values()
    return {
        "root": [],
        "stage": list(stages),
        "block": [block for stage in stages for block in stage[:]],
        "layer": [m for m in model.modules() if isinstance(m, nn.Linear)],
    }[by]


def shard(rank, world, address, name, by):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    model, images, labels = network(name)
    nn.functional.cross_entropy(model(images), labels).backward()
    wanted = gradients(model)
    model.zero_grad()
    mesh = init_device_mesh("cpu", (world,))
    for unit in units(model, by):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    share = len(images) // world
    mine = slice(rank * share, (rank + 1) * share)
    for _ in range(2):
        model.zero_grad()
        nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
    found = {key: g.full_tensor() for key, g in gradients(model).items()}
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4, msg=key)
    dg_timm.set_execution(model.eval(), "sparse")
    if by in ("block", "layer") and world > 1:
        with pytest.raises(dg_timm.UserError, match=r"wait for each other .*shard whole stages"):
            model(images)
    else:
        with torch.no_grad():
            assert model(images[:share]).shape == (share, 5)
    dist.destroy_process_group()


@pytest.mark.parametrize("by", ["root", "block"])
@pytest.mark.parametrize("name", SMALL[:1])
def test_sharded_gradients_are_those_of_the_whole_network(name, by, tmp_path):
    mp.spawn(shard, (2, f"file://{tmp_path}/rendezvous", name, by), nprocs=2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("by", ["root", "stage", "block", "layer"])
@pytest.mark.parametrize("name", SMALL)
def test_every_way_to_shard(name, by, world, tmp_path):
    mp.spawn(shard, (world, f"file://{tmp_path}/rendezvous", name, by), nprocs=world)


def replicate(rank, world, address):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    model, images, labels = network("dg_resnet18")
    topology = {name: torch.ones(len(s.edges), len(s.edges)).triu(1).bool() for name, s in graph_stages(model).items()}
    topology["layer3"][:, 1] = False  # the block of node 1, which makes node 0's feature, does not run
    topology["layer3"][1] = False
    topology["layer4"][:, 2] = False  # nor does the last one
    topology["layer4"][2] = False
    dg_timm.set_execution(model, "fixed", topology)
    dg_timm.set_threshold(model, 0.01)
    nn.functional.cross_entropy(model(images), labels).backward()
    wanted = gradients(model)
    left_out = {key for key, _ in model.named_parameters()} - wanted.keys()
    assert {"layer4.1.conv1.weight", "layer4.router2.fc.weight", "layer1.router0.threshold"} <= left_out
    model.zero_grad()
    replica = nn.parallel.DistributedDataParallel(model)
    share = len(images) // world
    mine = slice(rank * share, (rank + 1) * share)
    for _ in range(3):  # a parameter that is waited for is missed at the second step
        replica.zero_grad()
        nn.functional.cross_entropy(replica(images[mine]), labels[mine]).backward()
    found = gradients(model)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4, msg=key)
    assert all(not found[key].any() for key in left_out & found.keys())
    dist.destroy_process_group()


def test_ddp_over_fixed_execution_waits_for_nothing_that_is_left_out(tmp_path):
    mp.spawn(replicate, (2, f"file://{tmp_path}/rendezvous"), nprocs=2)


def test_what_is_left_out_gets_no_gradient_in_one_process():
    model, images, labels = network("dg_resnet18")
    dg_timm.set_threshold(model, 0.0)
    nn.functional.cross_entropy(model(images), labels).backward()
    assert all(router.threshold.grad is None for router in routers(model).values())
    assert all(p.grad is not None for key, p in model.named_parameters() if not key.endswith("threshold"))
