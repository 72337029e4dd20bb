"""train.py and validate.py as users run them: processes of their own, on real digits."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

import dg_timm
from dg_timm.training.run import networks as models
from dg_timm.training.run.session import command_to_go_on
from tests.training.kill_and_resume import finish, kill, start, state
from tests.training.test_sources import DIGITS, png, shards

SCRIPTS = Path(__file__).parents[2] / "train_scripts"
# a network without BatchNorm, so that nothing depends on how a batch is shared; and one with it
TINY = (
    "--data",
    "digits",
    "--image-size",
    "32",
    "--hflip",
    "0",
    "--batch-size",
    "32",
    "--workers",
    "0",
    "--log-every",
    "1",
)
PLAIN = ("--model", "dg_test_convnext2", "--opt", "adamw", "--lr", "1e-3", *TINY)
NORMED = ("--model", "dg_test_resnet", *TINY)


def run(script: str, *args: object, processes: int = 1, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend", "c10d",
                    "--rdzv_endpoint", "localhost:0"]  # fmt: skip
    command += [str(SCRIPTS / script), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)


def train(*args: object, **options: int) -> subprocess.CompletedProcess[str]:
    return run("train.py", *args, **options)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two epochs with an average of the weights."""
    output = tmp_path_factory.mktemp("runs") / "one"
    process = train(*PLAIN, "--train-limit", 320, "--epochs", 2, "--ema-decay", 0.9, "--output", output)
    assert process.returncode == 0, process.stderr
    return output, process


# --------------------------------------------------------------------------- what a run leaves


def test_a_run_reports_itself(finished):
    output, process = finished
    assert re.search(
        r"epoch 2/2: .*train_loss [\d.]+, .*eval_top1 [\d.]+.*ema_top1 [\d.]+.*cost 1\.0\d+", process.stdout
    )
    summary, updates = rows(output / "summary.csv"), rows(output / "updates.csv")
    assert [row["epoch"] for row in summary] == ["1", "2"]
    assert len(updates) == 20
    assert {
        "stages.0.blocks.weight",
        "stages.0.blocks.open",
        "cost",
        "eval_top5",
        "train_top1",
        "images_per_second",
    } <= set(summary[0])
    assert 0 < float(summary[0]["stages.0.blocks.weight"]) <= 1
    assert yaml.safe_load((output / "args.yaml").read_text())["model"] == "dg_test_convnext2"
    environment = json.loads((output / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert (output / "curves.png").stat().st_size > 5000
    assert "/10 [" in process.stderr  # the bar
    assert float(summary[1]["train_loss"]) < float(summary[0]["train_loss"])


def test_the_saved_model_is_the_one_that_was_evaluated(finished):
    output, _ = finished
    last = rows(output / "summary.csv")[-1]
    best = max(float(row[key]) for row in rows(output / "summary.csv") for key in ("eval_top1", "ema_top1"))
    checkpoints = [output / "checkpoints" / "last", output / "checkpoints" / "last" / "ema", output / "model"]
    process = run("validate.py", *checkpoints, *TINY[:4], "--workers", 0, "--batch-size", 32)
    assert process.returncode == 0, process.stderr
    raw, ema, model = (json.loads(line) for line in process.stdout.splitlines()[:3])
    assert raw["top1"] == float(last["eval_top1"])
    assert raw["loss"] == float(last["eval_loss"])
    assert ema["loss"] == float(last["ema_loss"])
    assert model["top1"] == best
    assert "top-1 (%)" in process.stdout  # the table, as several were asked for
    config = json.loads((output / "model" / "config.json").read_text())
    assert config["label_names"] == [str(k) for k in range(10)]
    assert config["architecture"] == "dg_test_convnext2"
    assert "digits" in (output / "model" / "README.md").read_text()


def test_an_output_folder_is_never_overwritten(finished):
    output, _ = finished
    before = (output / "summary.csv").read_text()
    process = train(*PLAIN, "--train-limit", 320, "--epochs", 2, "--output", output)
    assert process.returncode == 2
    assert "holds a run already (args.yaml): go on with --resume auto, or give another --output" in process.stderr
    assert (output / "summary.csv").read_text() == before


def test_a_resume_with_other_options_is_refused_and_shows_them(finished):
    output, _ = finished
    process = train(
        *PLAIN, "--train-limit", 320, "--epochs", 3, "--ema-decay", 0.9, "--output", output, "--resume", "auto"
    )
    assert process.returncode == 2
    assert "--epochs: 2 then, 3 now" in process.stderr
    same = train(
        *PLAIN, "--train-limit", 320, "--epochs", 2, "--ema-decay", 0.9, "--output", output, "--resume",
        output / "checkpoints" / "last",
        "--keep", 5, "--log-every", 4,
    )  # fmt: skip
    assert same.returncode == 0, same.stderr  # options of the run itself may differ


def test_a_static_network_trains_alike(tmp_path):
    output = tmp_path / "static"
    process = train("--model", "test_resnet", *TINY, "--train-limit", 64, "--epochs", 1, "--output", output)
    assert process.returncode == 0, process.stderr
    assert "cost" not in rows(output / "summary.csv")[0]
    again = timm.create_model(f"local-dir:{output / 'model'}", pretrained=True)
    assert not dg_timm.graph.stage.graph_stages(again)
    # and becomes the dynamic one's start and teacher
    dynamic = tmp_path / "dynamic"
    process = train(
        *NORMED, "--train-limit", 64, "--epochs", 1, "--initial-checkpoint", output / "model", "--distill",
        "--distill-weight", "1", "--freeze", "all-but-graph", "--lr", "0", "--output", dynamic,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    row = rows(dynamic / "summary.csv")[0]
    assert float(row["train_loss"]) < 1e-6  # the identity says what its teacher says
    assert row["eval_loss"] == rows(output / "summary.csv")[0]["eval_loss"]


def test_every_kind_of_option_together(tmp_path):
    process = train(
        *NORMED, "--train-limit", 128, "--val-limit", 40, "--epochs", 3, "--micro-batch", 8, "--opt", "lamb",
        "--layer-decay", 0.8, "--graph-lr-scale", 0.1, "--warmup-epochs", 1, "--sched", "poly", "--clip-grad", 1,
        "--clip-mode", "agc", "--mixup", 0.2, "--cutmix", 1, "--mixup-off-epoch", 2, "--auto-augment", "rand-m5-n2",
        "--reprob", 0.3, "--aug-repeats", 2, "--smoothing", 0.1, "--drop", 0.1, "--drop-path", 0.1, "--ema-decay", 0.99,
        "--grad-checkpointing", "--channels-last", "--mixed-precision", "bf16", "--loss", "bce", "--patience", 2,
        "--head-init-scale", 0.1, "--save-every", 3, "--keep", 1, "--output", tmp_path / "all",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert rows(tmp_path / "all" / "summary.csv")


def test_trackers_and_unreadable_images(tmp_path):
    """A damaged file in a folder of images: named, or left out and counted; and TensorBoard is written."""
    for name, label in (("one", 1), ("two", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in np.flatnonzero(DIGITS.target == label)[:20]:
            (tmp_path / "images" / name / f"{k}.png").write_bytes(png(k))
    for damaged in sorted((tmp_path / "images" / "two").iterdir())[:8]:
        damaged.write_bytes(damaged.read_bytes()[:50])
    options = (*NORMED, "--data", tmp_path / "images", "--batch-size", 8, "--epochs", 2)
    process = train(*options, "--output", tmp_path / "run")
    assert process.returncode == 2
    assert re.search(r"error: unreadable image in row \d+ of the training split of .*/two/\d+\.png", process.stderr)
    options = (*options, "--on-bad-image", "skip", "--report-to", "tensorboard", "--output", tmp_path / "skipping")
    process = train(*options)
    assert process.returncode == 0, process.stderr
    assert "skipped an unreadable image, row" in process.stdout
    summary = rows(tmp_path / "skipping" / "summary.csv")
    assert int(summary[1]["skipped_images"]) > int(summary[0]["skipped_images"]) > 0
    assert list((tmp_path / "skipping").rglob("events.out.tfevents*"))


def test_early_stopping(tmp_path):
    process = train(*PLAIN, "--lr", "0", "--train-limit", 32, "--val-limit", 40, "--epochs", 9, "--patience", 2,
                    "--output", tmp_path / "stale")  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "no better evaluation in 2 epochs" in process.stdout
    assert len(rows(tmp_path / "stale" / "summary.csv")) == 3


# --------------------------------------------------------------------------- several processes


def test_two_processes_give_the_loss_curve_of_one_and_the_same_evaluation(tmp_path, finished):
    output, _ = finished
    options = (*PLAIN, "--train-limit", 320, "--epochs", 2, "--ema-decay", 0.9)
    process = train(*options, "--output", tmp_path / "two", processes=2)
    assert process.returncode == 0, process.stderr
    for one, two in zip(rows(output / "updates.csv"), rows(tmp_path / "two" / "updates.csv"), strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-5)
        assert two["lr"] == one["lr"]
        assert two["top1"] == one["top1"]
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
        process = run(
            "validate.py", output / "model", *TINY[:4], "--workers", 0, "--batch-size", 50, processes=processes
        )
        assert process.returncode == 0, process.stderr
        line = json.loads(process.stdout.splitlines()[0])
        line.pop("seconds")
        lines.append(line)
    assert lines[0]["images"] == 360
    assert lines[0] == lines[1] == lines[2]


def test_two_processes_share_a_stream(tmp_path, finished):
    output, _ = finished
    train_shards, val_shards = shards(tmp_path / "train", count=3, rows=21), shards(tmp_path / "val", count=3, rows=11)
    data = (
        "--data",
        train_shards,
        "--val-data",
        val_shards,
        "--streaming",
        "--num-classes",
        10,
        "--shuffle-buffer",
        16,
    )
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


# --------------------------------------------------------------------------- interruptions


@pytest.mark.slow
def test_torchrun_goes_on_by_itself(tmp_path):
    """Elastic restart: a rank dies, torchrun starts all again, and they resume."""
    finish(tmp_path / "untouched", 2)
    kill(start(tmp_path / "killed", 2, restarts=2), "elastic", tmp_path / "killed", random.Random(0))
    assert state(tmp_path / "killed", 2) == state(tmp_path / "untouched", 2)


@pytest.mark.slow
def test_a_compiled_run(tmp_path):
    """Inductor (it needs a C++ compiler): checkpoints know nothing of it."""
    process = train(*NORMED, "--train-limit", 64, "--val-limit", 40, "--epochs", 1, "--compile", "--ema-decay", 0.9,
                    "--output", tmp_path / "run", timeout=580)  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert set(load_file(tmp_path / "run" / "model" / "model.safetensors")) == set(
        models.create("dg_test_resnet", num_classes=10).state_dict()
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    """As a scheduler or Ctrl-C sends it: to every process of the group, the workers included."""
    output = tmp_path / "run"
    command = [sys.executable, str(SCRIPTS / "train.py"), *NORMED, "--epochs", "50", "--workers", "2"]
    command += ["--output", str(output)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env, start_new_session=True
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


def test_a_killed_run_ends_as_if_nobody_had_touched_it(tmp_path):
    """The short version of tests/kill_and_resume.py, which kills more often: one rank, then all as they save."""
    rng = random.Random(0)
    finish(tmp_path / "untouched", 2)
    for _ in range(5):  # a run may end before the second kill
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        kinds = ("one", "writing")
        hits = [kill(start(tmp_path / "killed", 2), kind, tmp_path / "killed", rng) for kind in kinds]
        if all(hit.startswith(kind) for hit, kind in zip(hits, kinds, strict=True)):
            break
    else:
        raise AssertionError(f"no run was hit twice; the last: {hits}")
    finish(tmp_path / "killed", 2)
    assert state(tmp_path / "killed", 2) == state(tmp_path / "untouched", 2)


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


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "dg_resnett50"), "dg_resnett50 is no timm or dg_timm model; do you mean"),
        (("--data", "./nowhere"), "./nowhere is not there"),
        (("--label-key", "kind"), "--label-key kind: digits has no such column; its columns are image"),
        (("--num-classes", "4"), "--num-classes 4 is fewer than the 10 classes of digits"),
        (("--batch-size", "2000"), "--batch-size 2000 is more than the 1437 images"),
        (("--batch-size", "0"), "argument --batch-size: 0 is less than 1"),
        (("--batch-size", "30", "--micro-batch", "4"), "--micro-batch 4 does not divide the 30 images"),
        (("--batch-size", "3", "--mixup", "0.2"), "the micro-batch must be even, not 3"),
        (("--opt", "adamww"), "--opt adamww"),
        (("--lr", "fast"), "argument --lr: invalid amount value: 'fast'"),
        (("--lr", "nan"), "argument --lr: nan is not a finite number"),
        (("--smoothing", "1.5"), "1.5 is not between 0 and 1"),
        (("--model-kwargs", "edge_scale"), "--model-kwargs takes key=value, got 'edge_scale'"),
        (("--model-kwargs", "edgescale=1"), "edgescale"),
        (("--mixed-precision", "fp16"), "--mixed-precision fp16 needs a GPU"),
        (("--sync-bn",), "--sync-bn needs GPUs"),
        (("--distill",), "has no trained classifier"),
        (("--report-to", "wandbb"), "--report-to wandbb: there are"),
        (("--recipe", "nowhere"), "--recipe nowhere: no such file or recipe; there are cifar10"),
        (("--initial-checkpoint", "x.safetensors"), "checkpoint x.safetensors: there is no x.safetensors"),
        (("--resume", "nowhere"), "--resume nowhere: there is no such folder"),
        (("--auto-augment", "nonsense"), "timm can't make this augmentation (--auto-augment nonsense)"),
        (("--mean", "0.5", "0.5"), "--mean has 2 values for 3 channels"),
        (("--label-key", "image"), "column image of digits is Image"),
        (("--opt-kwargs", "betas=[0.9"), "'betas=[0.9' has no valid value"),
        (("--distill-temperature", "0"), "0 is not above 0"),
        (("--reci", "digits"), "unrecognized arguments: --reci"),
        (("--freeze", "all-but-graph", "--model", "test_resnet"), "it is static"),
        (("--warmup-epochs", "10"), "--warmup-epochs 10 leaves nothing of --epochs 10"),
        (("--in-chans", "2"), "--in-chans"),
    ],
)
def test_bad_input_ends_before_anything_is_written(tmp_path, capsys, args, message, monkeypatch):
    import train as script

    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "dg_test_resnet", "--workers", "0", "--output",
                                      str(tmp_path / "out"), *args])  # fmt: skip
    try:
        code = script.main()
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "has the unknown option 'learning_rate'; the nearest one is 'lr'"),
        ("batchsize: 1", "unknown option 'batchsize'; the nearest one is 'batch_size'"),
        ("lr: [1, 2", "is not valid YAML"),
        ("- 1", "must map options to values"),
        ("channels_last: maybe", "channels_last must be true or false, got 'maybe'"),
        ("epochs: many", "argument --epochs: invalid positive value: 'many'"),
    ],
)
def test_bad_recipes(tmp_path, capsys, text, message):
    import train as script

    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SystemExit):
        script.parse(["--recipe", str(tmp_path / "recipe.yaml")])
    assert message in capsys.readouterr().err


def test_images_that_are_all_unreadable_in_an_update_do_not_end_the_epoch(tmp_path):
    """Every other image of a shuffled epoch is damaged: some updates of two have none left."""
    for name, label in (("one", 1), ("two", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n, k in enumerate(np.flatnonzero(DIGITS.target == label)[:20]):
            (tmp_path / "images" / name / f"{k}.png").write_bytes(png(k)[: 50 if n % 2 else None])
    process = train(*NORMED, "--data", tmp_path / "images", "--on-bad-image", "skip", "--batch-size", 2, "--epochs", 1,
                    "--output", tmp_path / "run")  # fmt: skip
    assert process.returncode == 0, process.stderr
    row = rows(tmp_path / "run" / "summary.csv")[0]
    assert row["updates"] == "16"
    assert int(row["skipped_images"]) + int(row.get("eval_skipped_images", 0)) == 20


def test_a_resume_from_another_run_is_refused(finished, tmp_path):
    output, _ = finished
    process = train(*PLAIN, "--train-limit", 320, "--epochs", 2, "--ema-decay", 0.9, "--output", tmp_path / "new",
                    "--resume", output / "checkpoints" / "last")  # fmt: skip
    assert process.returncode == 2
    assert re.search("is of another run than --output .*--initial-checkpoint", process.stderr)


def test_the_command_to_go_on():
    assert command_to_go_on(["train.py", "--resume", "--seed", "1"], 1) == "python train.py --seed 1 --resume auto"
    assert command_to_go_on(["t.py", "--resume", "auto", "-x"], 1) == "python t.py -x --resume auto"
    assert command_to_go_on(["t.py", "--resume=a", "b"], 2).endswith("2 processes) t.py b --resume auto")


def test_one_channel(tmp_path):
    process = train(
        *NORMED, "--in-chans", 1, "--train-limit", 32, "--val-limit", 20, "--epochs", 1, "--output", tmp_path / "r"
    )
    assert process.returncode == 0, process.stderr


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    output = tmp_path / "run"
    process = train(*PLAIN, "--lr", "1e30", "--train-limit", 320, "--epochs", 1, "--save-every", 1, "--output", output)
    assert process.returncode == 1
    assert re.search(
        r"error: the (loss became nan|weights are no longer finite) at update \d+.*(saved yet|last good checkpoint)",
        process.stderr,
    )
    process = train(*PLAIN, "--opt", "sgd", "--lr", "1e4", "--train-limit", 320, "--epochs", 5, "--log-every", 3,
                    "--output", tmp_path / "other")  # fmt: skip
    assert process.returncode == 1
    assert re.search(r"the loss became (nan|inf) at update \d+ \(learning rate \d", process.stderr), process.stderr


def test_more_classes_than_the_head(tmp_path, finished):
    output, _ = finished
    process = run("validate.py", output / "model", "--data", shards(tmp_path / "w"), "--val-data", tmp_path / "w",
                  "--streaming", "--num-classes", 12)  # fmt: skip
    assert process.returncode == 2
    assert "has 10 classes" in process.stderr
    assert "12" in process.stderr


# --------------------------------------------------------------------------- recipes


RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_runs_dry(recipe, capsys, monkeypatch, tmp_path):
    import train as script

    monkeypatch.chdir(tmp_path)
    args = script.parse(["--recipe", str(recipe)])
    extra = [
        "--micro-batch",
        "2",
        "--image-size",
        "32",
        "--model",
        "dg_test_resnet",
        "--no-pretrained",
        "--distill",
        "none",
    ]
    extra += [] if args.data == "digits" else ["--epoch-size", "50000", "--num-classes", "10"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", str(recipe), "--dry-run", *extra])
    assert script.main() == 0
    out = capsys.readouterr().out
    assert "parameter groups" in out
    assert "images an update" in out
    assert "hours in all" in out
    assert not list(tmp_path.iterdir())


PAPER = {  # appendix 6.1: epochs, learning rate, warm-up, weight decay, smoothing, dropout
    "imagenet_mobilenetv2": (200, 0.4, 5, 4e-5, 0.1, 0.2),
    "imagenet_resnet": (100, 0.4, 5, 1e-4, 0.1, None),
    "imagenet_regnet": (100, 0.8, 5, 5e-5, 0.1, None),
    "imagenet_regnet_250": (250, 0.8, 5, 5e-5, 0.1, None),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper(name):
    import train as script

    args = script.parse(["--recipe", name])
    found = (args.epochs, args.lr, args.warmup_epochs, args.weight_decay, args.smoothing, args.drop)
    assert found == PAPER[name]
    assert (args.batch_size, args.momentum, args.sched) == (1024, 0.9, "cosine")
    assert args.opt in ("sgd", "momentum")  # timm's sgd is Nesterov's, as in Goyal et al. and in RegNet's code


def test_training_towards_a_cost(tmp_path):
    """Edges close as the target comes down; what is too dear is not the best."""
    static = timm.create_model("test_resnet", num_classes=10)
    save_file(static.state_dict(), tmp_path / "static.safetensors")
    process = train("--model", "dg_test_resnet", *TINY, "--initial-checkpoint", tmp_path / "static.safetensors",
                    "--skippable", "--target-cost", 0.5, "--cost-weight", 100, "--cost-ramp", 0.2,
                    "--graph-lr-scale", 30, "--opt", "adamw", "--lr", 1e-3, "--train-limit", 320, "--epochs", 6,
                    "--output", tmp_path / "run")  # fmt: skip
    assert process.returncode == 0, process.stderr
    table = rows(tmp_path / "run" / "summary.csv")
    assert float(table[-1]["eval_cost"]) < 0.9 * float(table[0]["eval_cost"])
    for row in table:
        excess = max(0.0, float(row["eval_cost"]) - 0.5)
        assert float(row["eval_value"]) == pytest.approx(float(row["eval_top1"]) - 100 * excess, abs=1e-6)
    best = max(table, key=lambda row: float(row["eval_value"]))
    assert f"in epoch {best['epoch']};" in process.stdout


@pytest.mark.parametrize(
    ("options", "error"),
    [(("--model", "test_resnet", "--target-cost", 0.5), "is a static network"),
     (("--model", "dg_test_resnet", "--target-cost", 0.5, "--compile"), "leave one of them out"),
     (("--model", "dg_test_resnet", "--skippable"), "only an identity conversion can be made skippable")],
)  # fmt: skip
def test_costs_that_can_not_be_aimed_at(options, error, tmp_path):
    process = train(*TINY, *options, "--train-limit", 64, "--output", tmp_path / "run")
    assert process.returncode == 2
    assert error in process.stderr
    assert not (tmp_path / "run").exists()
