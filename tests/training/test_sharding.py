"""Networks that are shared out over processes (FSDP2): pieces in processes of their own, and runs of train.py."""

import copy
import shutil
import sys

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dg_timm.training.loop.distributed import HostAllReduce
from dg_timm.training.loop.sharding import Whole, gather, in_step, load, load_optimizer, shard
from dg_timm.training.run.networks import create
from tests.helpers.networks import randomize, randomize_graph
from tests.helpers.training import NORMED, train
from tests.training.kill_and_resume import state

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_gloo_available(), reason="needs gloo")


def network():
    torch.manual_seed(0)
    return randomize_graph(randomize(timm.create_model("dg_resnet18", num_classes=5))).train()


def local_numbers(model):
    return sum(p.to_local().numel() for p in model.parameters())


def check_pieces(rank):
    """A process keeps half of every parameter; what it saves and loads is whole."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    whole = Whole(model)
    shard(model, torch.device("cpu"))
    assert local_numbers(model) < 0.51 * sum(value.numel() for value in before.values())
    assert {key: value.shape for key, value in gather(model.state_dict()).items()} == {
        key: value.shape for key, value in before.items()
    }
    found = whole.of(model, wanted=rank == 0)
    assert (found is None) == (rank != 0)
    if found is not None:
        assert all(torch.equal(value, before[key]) for key, value in found.state_dict().items())
        assert not any(m.training for m in found.modules())

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))).square().mean().backward()
    optimizer.step()
    weights, moments = gather(model.state_dict()), gather(optimizer.state_dict())
    assert not all(torch.equal(value, before[key]) for key, value in weights.items())
    load(model, before)
    fresh = torch.optim.AdamW(model.parameters(), lr=1.0)
    load_optimizer(fresh, moments)
    load(model, weights)
    assert all(torch.equal(value, weights[key]) for key, value in gather(model.state_dict()).items())
    again = gather(fresh.state_dict())
    assert again["param_groups"] == moments["param_groups"]
    for number, of_parameter in moments["state"].items():
        assert all(torch.equal(value, again["state"][number][name]) for name, value in of_parameter.items())


def check_static(rank):
    """A sharded static network predicts the same."""
    for name in ("resnet18", "vit_tiny_patch16_224"):  # blocks that can be told, and none
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, **({"img_size": 32} if "vit" in name else {}))
        before = copy.deepcopy(model)
        shard(model, torch.device("cpu"))
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(model.eval()(x), before.eval()(x))


def check_steps(rank):
    """Processes run equally many batches, until one is to stop."""
    all_reduce = HostAllReduce()
    mine = iter([["a", "b", "c"], ["d"]][rank])
    assert list(in_step(mine, lambda: "-", lambda: False, all_reduce.sum)) == [["a", "b", "c"], ["d", "-", "-"]][rank]
    stop = iter([False, rank == 1])
    assert len(list(in_step(iter("abcd"), lambda: "-", lambda: next(stop), all_reduce.sum))) == 1


def check_buffers(rank):
    """What a state dict leaves out comes back, too."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("positions", torch.arange(4.0), persistent=False)
    whole = Whole(model)
    shard(model, torch.device("cpu"))
    found = whole.of(model, wanted=True)
    assert torch.equal(found.positions, torch.arange(4.0))


CHECKS = (check_pieces, check_static, check_steps, check_buffers)


def check_all(rank, address):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for check in CHECKS:
        check(rank)
    dist.destroy_process_group()


def test_networks_are_shared_out_and_made_whole(tmp_path):
    """Two processes make all checks above; torch takes seconds to import in each."""
    mp.spawn(check_all, args=(f"file://{tmp_path}/address",), nprocs=2)


OPTIONS = (*NORMED, "--fsdp", "--train-limit", 240, "--val-limit", 65, "--micro-batch", 8, "--opt", "adamw",
           "--lr", "1e-3", "--ema-decay", 0.9, "--clip-grad", 1, "--drop", 0.1)  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(tmp_path):
    options = (*OPTIONS, "--epochs", 2, "--save-every", 3, "--keep", 9)
    process = train(*options, "--output", tmp_path / "whole", processes=2)
    assert process.returncode == 0, process.stderr
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "part" / "checkpoints", symlinks=True)
    for later in sorted((tmp_path / "part" / "checkpoints").glob("update-*"))[2:]:
        shutil.rmtree(later)
    process = train(*options, "--output", tmp_path / "part", "--resume", "auto", processes=2)
    assert process.returncode == 0, process.stderr
    assert "going on from" in process.stdout
    assert state(tmp_path / "part", 2) == state(tmp_path / "whole", 2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--target-cost", 0.8, "--no-cascade"), ("--model", "test_resnet",
                         "--mixed-precision", "bf16", "--grad-checkpointing")])  # fmt: skip
def test_gates_and_static_networks_train_sharded(tmp_path, options):
    process = train(*OPTIONS, *options, "--epochs", 1, "--output", tmp_path / "run", processes=2)
    assert process.returncode == 0, process.stderr
    assert create(str(tmp_path / "run" / "model")).num_classes == 10


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--fsdp",), "--fsdp shares a network out over processes, and there is one: start it by torchrun"),
        (("--fsdp", "--opt", "lamb", "--compile"), "--fsdp does not go with --opt lamb, --compile; it takes --opt sgd"),
    ],
)
def test_what_can_not_be_sharded_is_refused(tmp_path, options, match):
    process = train(*NORMED, *options, "--output", tmp_path / "run")
    assert process.returncode == 2
    assert match in process.stderr
    assert not (tmp_path / "run").exists()
