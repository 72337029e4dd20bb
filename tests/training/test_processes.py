"""Several processes give the results of one."""

import json

import pytest

from tests.helpers.files import shards
from tests.helpers.scripts import rows, run
from tests.helpers.training import FINISHED, PLAIN, train, validate


@pytest.mark.parametrize("sharded", [(), ("--fsdp",)])
def test_two_processes_give_the_loss_curve_of_one(tmp_path, finished, sharded):
    output, _ = finished
    process = train(*FINISHED, *sharded, "--output", tmp_path / "two", processes=2)
    assert process.returncode == 0, process.stderr
    assert "broadcast_buffers" not in process.stderr  # what Accelerate itself passes to torch is not the user's affair
    for one, two in zip(rows(output / "updates.csv"), rows(tmp_path / "two" / "updates.csv"), strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-5)
        assert two["lr"] == one["lr"]
        assert two["top1"] == one["top1"]
    if not sharded:
        return
    figures = json.loads(validate(tmp_path / "two" / "model").stdout.splitlines()[-1])
    best = max(rows(tmp_path / "two" / "summary.csv"), key=lambda row: float(row["eval_top1"]))
    assert figures["top1"] == float(best["eval_top1"])
    assert figures["loss"] == pytest.approx(float(best["eval_loss"]), rel=1e-12)


@pytest.mark.slow
def test_several_processes_evaluate_as_one(tmp_path, finished):
    output, _ = finished
    # train.py's own evaluation, of weights that stay as they are
    still = (*PLAIN, "--lr", "0", "--train-limit", 32, "--epochs", 1)
    own = []
    for processes in (1, 2):
        assert train(*still, "--output", tmp_path / f"still{processes}", processes=processes).returncode == 0
        own.append(
            {k: v for k, v in rows(tmp_path / f"still{processes}" / "summary.csv")[0].items() if k.startswith("eval_")}
        )
        own[-1].pop("eval_seconds")
    assert own[0] == own[1]
    # the same weights, evaluated by one, two and three processes: 360 images divide by none of the batches
    lines = []
    for processes in (1, 2, 3):
        process = validate(output / "model", "--batch-size", 50, processes=processes)
        assert process.returncode == 0, process.stderr
        line = json.loads(process.stdout.splitlines()[0])
        line.pop("seconds")
        lines.append(line)
    assert lines[0]["images"] == 360
    assert lines[0] == lines[1] == lines[2]


@pytest.mark.slow
def test_two_processes_share_a_stream(tmp_path, finished):
    output, _ = finished
    train_shards, val_shards = shards(tmp_path / "train", count=3, rows=21), shards(tmp_path / "val", count=3, rows=11)
    data = ("--data", train_shards, "--val-data", val_shards, "--streaming", "--num-classes", 10)
    data += ("--shuffle-buffer", 16)
    options = (*PLAIN, *data, "--epoch-size", 63, "--batch-size", 8, "--epochs", 2)
    process = train(*options, "--output", tmp_path / "two", processes=2)
    assert process.returncode == 0, process.stderr
    assert "3 shards for 2 processes: some will wait for others" in process.stdout
    lines = []
    for processes in (1, 2):
        process = run("validate.py", output / "model", *data, "--image-size", 32, "--workers", 1, processes=processes)
        assert process.returncode == 0, process.stderr
        lines.append(json.loads(process.stdout.splitlines()[-1]))
        lines[-1].pop("seconds")
    assert lines[0]["images"] == 33
    assert lines[0] == lines[1]
