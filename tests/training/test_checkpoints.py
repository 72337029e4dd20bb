"""Checkpoints that are verified, rotated, and never half-written."""

import contextlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from dg_timm._errors import BadState
from dg_timm.training.loop.checkpoints import Checkpoints, find_fault, latest_valid
from dg_timm.training.loop.distributed import HostAllReduce
from dg_timm.training.loop.progress import EpochSums, Progress


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.norm = torch.nn.BatchNorm1d(2)


def setup(folder, keep=2):
    accelerator = Accelerator(cpu=True)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    model.norm(model.layer(torch.randn(4, 3))).sum().backward()
    optimizer.step()
    ema = Net()
    checkpoints = Checkpoints(
        folder, accelerator, HostAllReduce(), model, ema, keep=keep, args={"lr": 0.1},
        write_config=lambda network, place: (place / "config.json").write_text("{}", encoding="utf-8"),
    )  # fmt: skip
    return checkpoints, model, ema, optimizer


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.is_symlink())


def test_everything_comes_back(tmp_path):
    checkpoints, model, ema, optimizer = setup(tmp_path)
    checkpoints.states["progress"] = progress = Progress(epoch=3, sums=EpochSums(loss=0.1, metrics={"top1": 3.0}))
    place = checkpoints.save("update-00000001", {"images": 64})
    progress.start_epoch()
    drawn = torch.rand(3)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    average = ema.layer.weight.clone()
    moment = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with torch.no_grad():
        for p in (*model.parameters(), *ema.parameters()):
            p.zero_()
        optimizer.state_dict()["state"][0]["exp_avg"].zero_()
    assert checkpoints.load(place) == {"images": 64}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in saved.items())
    assert torch.equal(average, ema.layer.weight)
    assert torch.equal(moment, optimizer.state_dict()["state"][0]["exp_avg"])
    assert torch.equal(drawn, torch.rand(3))  # the random generators, too
    assert progress == Progress(epoch=3, sums=EpochSums(loss=0.1, metrics={"top1": 3.0}))
    assert progress.best.metric == -math.inf
    assert (place / "ema" / "config.json").exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints, *_ = setup(tmp_path, keep=2)
    for update in range(1, 6):
        checkpoints.save(f"update-{update:08d}", None)
        if update == 2:
            checkpoints.mark_best("update-00000002")
    assert names(tmp_path) == ["update-00000002", "update-00000004", "update-00000005"]
    assert os.readlink(tmp_path / "last") == "update-00000005"
    assert os.readlink(tmp_path / "best") == "update-00000002"


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda p: (p / "hashes.json").unlink(), "hashes.json is missing"),
        (lambda p: (p / "hashes.json").write_text("{", encoding="utf-8"), "hashes.json can't be read"),
        (lambda p: (p / "hashes.json").write_text("[]", encoding="utf-8"), "hashes.json names no file"),
        (lambda p: (p / "optimizer.bin").unlink(), "optimizer.bin is missing"),
        (
            lambda p: (p / "ema" / "config.json").write_bytes(b"x"),
            "ema/config.json is not what was written",
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, damage, fault):
    checkpoints, *_ = setup(tmp_path)
    first, second = (checkpoints.save(f"update-{k:08d}", None) for k in (1, 2))
    damage(second)
    place, skipped = latest_valid(tmp_path)
    assert place == str(first)
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{second}: {fault}")
    checkpoints.save("update-00000002", None)  # reached again: the damaged one is set aside, not lost
    assert find_fault(second) is None
    assert [n.split("-")[0] for n in names(tmp_path)].count("aside") == 1


def test_what_lies_after_the_start_is_set_aside(tmp_path):
    """Going on from an older checkpoint: the newer ones are neither lost nor taken for this course's newest."""
    checkpoints, *_ = setup(tmp_path)
    first = checkpoints.save("update-00000001", None)
    checkpoints.save("update-00000009", None)
    checkpoints.clean(first)
    checkpoints.save("update-00000003", None)
    assert latest_valid(tmp_path)[0] == str(tmp_path / "update-00000003")
    assert os.readlink(tmp_path / "last") == "update-00000003"
    assert sum(name.startswith("aside-update-00000009") for name in names(tmp_path)) == 1


def test_a_sound_checkpoint_is_left_alone(tmp_path):
    checkpoints, model, *_ = setup(tmp_path)
    place = checkpoints.save("update-00000001", None)
    before = (place / "hashes.json").read_text(encoding="utf-8")
    torch.nn.init.zeros_(model.layer.weight)
    checkpoints.save("update-00000001", None)
    assert (place / "hashes.json").read_text(encoding="utf-8") == before


@pytest.mark.parametrize("failing", ["save_file", "_write_hashes"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failing):
    checkpoints, *_ = setup(tmp_path)
    first = checkpoints.save("update-00000001", None)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"dg_timm.training.loop.checkpoints.{failing}", full)
    message = r"update-00000002 can't be written .*No space left on device.*the newest one, update-00000001, is intact"
    with pytest.raises(BadState, match=message):
        checkpoints.save("update-00000002", None)
    assert names(tmp_path) == ["update-00000001"]
    assert find_fault(first) is None


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=200k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting is not allowed here")
    try:
        checkpoints, *_ = setup(disk)
        first = checkpoints.save("update-00000001", None)
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(bytes(200_000))
        with pytest.raises(BadState, match=r"can't be written .*; the newest one, update-00000001, is intact"):
            checkpoints.save("update-00000002", None)
        assert names(disk) == ["filler", "update-00000001"]
        assert find_fault(first) is None
    finally:
        os.system(f"umount {disk}")


def test_no_checkpoint_is_a_pickle_that_runs(tmp_path):
    """All that Accelerate writes is read back with weights_only=True."""
    checkpoints, *_ = setup(tmp_path)
    place = checkpoints.save("update-00000001", None)

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harmed",)

    pickles = [
        file for file in place.rglob("*") if file.suffix not in (".safetensors", ".json", ".yaml") and file.is_file()
    ]
    assert {file.name for file in pickles} == {"optimizer.bin", "random_states_0.pkl"}
    for file in pickles:
        whole = file.read_bytes()
        torch.save(Harm(), file)
        with contextlib.suppress(Exception):  # Accelerate goes on without random states
            checkpoints.load(place)
        file.write_bytes(whole)
    assert not (tmp_path / "harmed").exists()
    assert "optimizer.bin" in json.loads((place / "hashes.json").read_text(encoding="utf-8"))
