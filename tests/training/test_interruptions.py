"""A run that was killed or stopped goes on as if nobody had touched it."""

import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from dg_timm.training.run.lifecycle import command_to_go_on
from tests.helpers.files import shards
from tests.helpers.scripts import command, one_thread
from tests.helpers.training import FINISHED, NORMED, train
from tests.training.kill_and_resume import finish, kill, start, state


@pytest.mark.slow
def test_torchrun_goes_on_by_itself(tmp_path):
    """Elastic restart: a rank dies, torchrun starts all again, and they resume."""
    finish(tmp_path / "untouched", 2)
    kill(start(tmp_path / "killed", 2, restarts=2), "elastic", tmp_path / "killed", random.Random(0))
    assert state(tmp_path / "killed", 2) == state(tmp_path / "untouched", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    """As a scheduler or Ctrl-C sends it: to every process of the group, the workers included."""
    output = tmp_path / "run"
    words = command("train.py", *NORMED, "--epochs", 50, "--workers", 2, "--output", output)
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env=one_thread(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/update-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert re.search(
        r"stopped by signal (15|2); saved .*update-\d+.*Go on with:\n  python .*train.py .*--resume auto", out
    )
    assert os.readlink(output / "checkpoints" / "last") in out


@pytest.mark.parametrize(
    ("processes", "kinds"),
    [
        (1, ("writing",)),
        pytest.param(1, ("one", "writing"), marks=pytest.mark.slow),
        pytest.param(2, ("one", "writing"), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_if_nobody_had_touched_it(tmp_path, processes, kinds):
    """The short version of kill_and_resume.py, which kills more often: one rank, or all as they save."""
    rng = random.Random(0)
    finish(tmp_path / "untouched", processes)
    for _ in range(5):  # a run may end before the second kill
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        hits = [kill(start(tmp_path / "killed", processes), kind, tmp_path / "killed", rng) for kind in kinds]
        if all(hit.startswith(kind) for hit, kind in zip(hits, kinds, strict=True)):
            break
    else:
        raise AssertionError(f"no run was hit each time; the last: {hits}")
    finish(tmp_path / "killed", processes)
    assert state(tmp_path / "killed", processes) == state(tmp_path / "untouched", processes)


@pytest.mark.slow
def test_a_killed_stream_goes_on_where_it_was(tmp_path):
    """Stopped in the midst of an epoch of a stream: the same weights as without the stop."""
    train_shards, val_shards = shards(tmp_path / "train", count=3, rows=16), shards(tmp_path / "val", count=1, rows=10)
    options = (
        *NORMED, "--data", train_shards, "--val-data", val_shards, "--streaming", "--num-classes", 10,
        "--shuffle-buffer", 10,
        "--epoch-size", 48, "--batch-size", 4, "--epochs", 2, "--save-every", 5, "--keep", 9,
    )  # fmt: skip
    assert train(*options, "--output", tmp_path / "whole").returncode == 0
    assert train(*options, "--output", tmp_path / "part").returncode == 0
    checkpoints = tmp_path / "part" / "checkpoints"
    for name in sorted(p.name for p in checkpoints.glob("update-*"))[1:]:  # all but update 5 of 12
        for file in (checkpoints / name).rglob("*"):
            if file.is_file():
                file.unlink()
    process = train(*options, "--output", tmp_path / "part", "--resume", "auto")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("hashes.json is missing") >= 3  # which were passed over, and why
    assert "epoch 1, update 5" in process.stdout
    whole, part = (load_file(tmp_path / n / "checkpoints" / "last" / "model.safetensors") for n in ("whole", "part"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)


def test_a_resume_with_other_options_is_refused_and_shows_them(finished):
    output, _ = finished
    process = train(*FINISHED, "--epochs", 3, "--output", output, "--resume", "auto")
    assert process.returncode == 2
    assert "--epochs: 2 then, 3 now" in process.stderr
    same = train(
        *FINISHED, "--output", output, "--resume", output / "checkpoints" / "last", "--keep", 5, "--log-every", 4
    )
    assert same.returncode == 0, same.stderr  # options of the run itself may differ


def test_a_resume_from_another_run_is_refused(finished, tmp_path):
    output, _ = finished
    process = train(*FINISHED, "--output", tmp_path / "new", "--resume", output / "checkpoints" / "last")
    assert process.returncode == 2
    assert re.search("is of another run than --output .*--initial-checkpoint", process.stderr)


def test_the_command_to_go_on():
    assert command_to_go_on(["train.py", "--resume", "--seed", "1"], 1) == "python train.py --seed 1 --resume auto"
    assert command_to_go_on(["t.py", "--resume", "auto", "-x"], 1) == "python t.py -x --resume auto"
    assert command_to_go_on(["t.py", "--resume=a", "b"], 2).endswith("2 processes) t.py b --resume auto")
