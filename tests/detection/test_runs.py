"""Runs of detect.py, in processes of their own."""

import csv
import io
import json
import math
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from dg_timm._errors import BadValue
from dg_timm.cli import detect as cli
from dg_timm.detection.run.saved import evaluate_saved
from dg_timm.detection.run.task import build_detection_task
from dg_timm.detection.saving import load_detector
from dg_timm.graph.gate import gates
from dg_timm.training.loop.distributed import InterruptFlag
from dg_timm.training.loop.optimization import BatchSplit
from tests.helpers.detection import TINY, write_coco
from tests.helpers.scripts import rows, run
from tests.training.kill_and_resume import finish, kill, start, state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("detect") / "run"
    process = run("detect.py", *TINY, "--epochs", 2, "--ema-decay", 0.5, "--output", output)
    assert process.returncode == 0, process.stderr
    return output, process


def test_what_a_run_leaves(finished):
    output, process = finished
    table_ = rows(output / "summary.csv")
    assert [row["epoch"] for row in table_] == ["1", "2"]
    assert {"train_loss", "train_loss_box_reg", "eval_AP", "ema_AP50", "cost", "weight.layer1"} <= set(table_[0])
    assert re.search(r"best: AP \(%\) [\d.]+ in epoch", process.stdout)
    assert json.loads((output / "model" / "config.json").read_text(encoding="utf-8"))["backbone"] == "dg_test_resnet"
    for result in json.loads((output / "predictions.json").read_text(encoding="utf-8")):
        assert result["image_id"] in range(60)
        assert result["category_id"] in range(10)
    with (output / "per_class.csv").open(encoding="utf-8") as stream:
        assert [row["category"] for row in csv.DictReader(stream)] == list(map(str, range(10)))
    for picture in ("detections.png", "curves.png"):
        assert Image.open(io.BytesIO((output / picture).read_bytes())).width > 300
    assert load_detector(str(output / "checkpoints" / "best" / "ema")).config["detector"] == "faster_rcnn"
    best = max(table_, key=lambda row: max(float(row["eval_AP"]), float(row["ema_AP"])))
    prefix = max(("ema", "eval"), key=lambda prefix: float(best[f"{prefix}_AP"]))
    figures = json.loads((output / "figures.json").read_text(encoding="utf-8"))
    assert figures["AP"] == pytest.approx(float(best[f"{prefix}_AP"]))
    again = run("detect.py", "--evaluate", output / "model", *TINY[:2], "--val-limit", 7, "--workers", 0)
    line = json.loads(next(row for row in again.stdout.splitlines() if row.startswith("{")))
    assert figures.items() <= line.items()  # the model, and its predictions, are those of the better network


def test_a_backbone_learns_to_skip(tmp_path):
    """Its cost is that of what evaluates."""
    towards = (*TINY, "--cost-ramp", 0, "--gate-lr-scale", 300, "--epochs", 1)
    process = run("detect.py", *towards, "--target-cost", 0.7, "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert "backbone: 4 of 4 blocks have a gate" in process.stdout
    (row,) = rows(tmp_path / "run" / "summary.csv")
    excess = max(0.0, float(row["eval_cost"]) - 0.7)
    assert float(row["eval_value"]) == pytest.approx(float(row["eval_AP"]) - 100 * excess)
    assert (
        process.stdout.strip()
        .splitlines()[-1]
        .startswith(f"cost aimed at: 0.7 (it costs {float(row['eval_cost']):.3f})")
    )
    figures = json.loads((tmp_path / "run" / "figures.json").read_text(encoding="utf-8"))
    assert figures["cost"] == float(row["eval_cost"]) < 1
    detector = load_detector(str(tmp_path / "run" / "model"))
    assert len(gates(detector.backbone.body)) == 4


@pytest.mark.parametrize(
    ("targets", "message"),
    [((0.2,), "--target-cost 0.2 can't be reached"), ((0.7, 1), "takes one cost for a detector")],
)
def test_targets_that_are_refused(targets, message):
    args = cli.parse([str(word) for word in (*TINY, "--target-cost", *targets)])
    with pytest.raises(BadValue, match=message):
        build_detection_task(args, Accelerator(cpu=True), BatchSplit(4, 4, 1, 1))


@pytest.mark.slow
def test_two_processes_evaluate_to_the_same_figures(finished, tmp_path):
    output, _ = finished
    found = []
    for processes in (1, 2):
        process = run("detect.py", "--evaluate", output / "model", *TINY[:2], "--val-limit", 7, "--workers", 0,
                      "--picture-score", 0, "--pictures", 1, "--val-batch-size", 2, "--output",
                      tmp_path / str(processes), processes=processes)  # fmt: skip
        assert process.returncode == 0, process.stderr
        line = json.loads(next(row for row in process.stdout.splitlines() if row.startswith("{")))
        line.pop("seconds")
        found.append((line, (tmp_path / str(processes) / "predictions.json").read_bytes()))
    assert found[0] == found[1]
    assert found[0][0]["images"] == 7


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """The same images an update, the same regions of them, norms with fixed statistics: weights agree to rounding."""
    networks = []
    for processes, updates in ((1, 4), (2, 4), (1, 1)):
        output = tmp_path / f"{processes}-{updates}"
        process = run("detect.py", *TINY, "--updates", updates, "--micro-batch", 2, "--opt", "sgd", "--lr", 0.01,
                      "--freeze-norm", "--pictures", 0, "--output", output, processes=processes)  # fmt: skip
        assert process.returncode == 0, process.stderr
        networks.append(load_file(output / "checkpoints" / "last" / "model.safetensors"))
    alone, shared, before = networks
    learned = [name for name in alone if alone[name].is_floating_point() and not torch.equal(alone[name], before[name])]
    assert len(learned) > 20

    def distance(one, other):
        return sum(float((one[name] - other[name]).pow(2).sum()) for name in learned) ** 0.5

    assert distance(alone, shared) < 1e-3 * distance(alone, before)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    untouched, output = tmp_path / "untouched", tmp_path / "killed"
    finish(untouched, 1, "detect.py")
    process = start(output, 1, script="detect.py")
    assert "killed" in kill(process, "all", output, random.Random(0))
    finish(output, 1, "detect.py")
    assert state(output, 1) == state(untouched, 1)
    assert rows(output / "summary.csv")[-1]["eval_AP"] == rows(untouched / "summary.csv")[-1]["eval_AP"]


def test_an_evaluation_replaces_nothing(finished, tmp_path):
    output, _ = finished
    before = {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
    for target in (("--evaluate", output / "model", "--output", output), ("--output", output)):
        process = run("detect.py", *TINY, *target, "--pictures", 0)
        assert process.returncode == 2
        assert "holds a run already (args.yaml)" in process.stderr
    assert before == {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
    (tmp_path / "predictions.json").write_text("mine", encoding="utf-8")
    process = run("detect.py", *TINY, "--output", tmp_path)
    assert process.returncode == 2
    assert (tmp_path / "predictions.json").read_text(encoding="utf-8") == "mine"


def test_an_evaluation_that_is_stopped_says_so(finished, capsys, tmp_path):
    args = cli.parse(["--data", "digits", "--evaluate", str(finished[0] / "model"), "--val-limit", "3",
                      "--workers", "0", "--output", str(tmp_path / "out")])  # fmt: skip
    stop = InterruptFlag()
    stop.signal = signal.SIGTERM
    with pytest.raises(SystemExit) as stopped:
        evaluate_saved(args, Accelerator(cpu=True), stop)
    assert stopped.value.code == 128 + 15
    assert "stopped before all images were seen" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


WAYS = [
    ("--mixed-precision", "bf16", "--channels-last"),
    pytest.param(("--detector", "fcos", "--fpn-channels", 64, "--grad-checkpointing"), marks=pytest.mark.slow),
    pytest.param(("--compile", "--ema-decay", 0.5), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", WAYS)
def test_other_ways_to_run(options, tmp_path):
    process = run("detect.py", *TINY, "--epochs", 1, *options, "--output", tmp_path / "run", timeout=900)
    assert process.returncode == 0, process.stderr
    assert math.isfinite(float(rows(tmp_path / "run" / "summary.csv")[0]["train_loss"]))
    execution = ("--execution", "sparse") if "--mixed-precision" in options else ()
    process = run("detect.py", "--evaluate", tmp_path / "run", *TINY[:2], "--val-limit", 3, "--workers", 0, *execution)
    assert process.returncode == 0, process.stderr


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    folder = Path(write_coco(tmp_path / "data"))
    for name in ("2.png", "val2.png"):
        (folder / "images" / name).write_bytes(b"no image")
    options = [*TINY[2:], "--data", folder, "--epochs", 1, "--batch-size", 1, "--train-limit", 3, "--pictures", 1]
    process = run("detect.py", *options, "--output", tmp_path / "stopped")
    assert process.returncode == 2
    assert "--on-bad-image skip leaves it out" in process.stderr
    process = run("detect.py", *options, "--on-bad-image", "skip", "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    row = rows(tmp_path / "run" / "summary.csv")[0]
    assert (row["skipped_images"], row["eval_skipped_images"]) == ("1", "1")


def test_a_run_may_be_counted_in_updates(tmp_path):
    process = run("detect.py", *TINY, "--updates", 6, "--sched", "multistep", "--milestone-updates", 4,
                  "--decay-rate", 0.1, "--warmup-updates", 2, "--warmup-lr", 1e-4, "--pictures", 0,
                  "--output", tmp_path / "run")  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "schedule is off" not in process.stdout
    table_ = rows(tmp_path / "run" / "updates.csv")
    assert [int(row["update"]) for row in table_] == [1, 2, 3, 4, 5, 6]  # an epoch has 4
    assert [float(row["lr"]) for row in table_] == pytest.approx([1e-4, 5.5e-4, 1e-3, 1e-4, 1e-4, 1e-4])
    assert rows(tmp_path / "run" / "summary.csv")[-1]["updates"] == "6"


def test_a_dry_run_writes_nothing(tmp_path):
    process = run("detect.py", *TINY, "--dry-run", "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert re.search(r"faster_rcnn over dg_test_resnet: .* 4 dynamic stages", process.stdout)
    assert "4 images an update = 4 at a time" in process.stdout
    assert "data digits: " in process.stdout
    assert not (tmp_path / "run").exists()
    process = run("detect.py", *TINY, "--data-summary", tmp_path / "samples.png", "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert f"{tmp_path / 'samples.png'} shows 16 of them" in process.stdout
    assert not (tmp_path / "run").exists()
