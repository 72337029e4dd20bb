"""What a run of train.py leaves, and what it says; processes of their own, on real digits."""

import json
import re

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from dg_timm.graph.stage import graph_stages
from dg_timm.training.run import networks
from tests.helpers.files import image_folder
from tests.helpers.scripts import rows
from tests.helpers.training import FINISHED, NORMED, PLAIN, TINY, train, validate


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
    assert yaml.safe_load((output / "args.yaml").read_text(encoding="utf-8"))["model"] == "dg_test_convnext2"
    environment = json.loads((output / "environment.json").read_text(encoding="utf-8"))
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert (output / "curves.png").stat().st_size > 5000
    assert "/10 [" in process.stderr  # the bar
    assert float(summary[1]["train_loss"]) < float(summary[0]["train_loss"])


def test_the_saved_model_is_the_one_that_was_evaluated(finished):
    output, _ = finished
    last = rows(output / "summary.csv")[-1]
    best = max(float(row[key]) for row in rows(output / "summary.csv") for key in ("eval_top1", "ema_top1"))
    checkpoints = [output / "checkpoints" / "last", output / "checkpoints" / "last" / "ema", output / "model"]
    process = validate(*checkpoints, "--batch-size", 32)
    assert process.returncode == 0, process.stderr
    raw, ema, model = (json.loads(line) for line in process.stdout.splitlines()[:3])
    assert raw["top1"] == float(last["eval_top1"])
    assert raw["loss"] == float(last["eval_loss"])
    assert ema["loss"] == float(last["ema_loss"])
    assert model["top1"] == best
    assert "top-1 (%)" in process.stdout  # the table, as several were asked for
    config = json.loads((output / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["label_names"] == [str(k) for k in range(10)]
    assert config["architecture"] == "dg_test_convnext2"
    assert "digits" in (output / "model" / "README.md").read_text(encoding="utf-8")


def test_an_output_folder_is_never_overwritten(finished):
    output, _ = finished
    before = (output / "summary.csv").read_text(encoding="utf-8")
    process = train(*FINISHED, "--output", output)
    assert process.returncode == 2
    assert "holds a run already (args.yaml): go on with --resume auto, or give another --output" in process.stderr
    assert (output / "summary.csv").read_text(encoding="utf-8") == before


def test_a_static_network_trains_alike(tmp_path):
    output = tmp_path / "static"
    process = train("--model", "test_resnet", *TINY, "--train-limit", 64, "--epochs", 1, "--output", output)
    assert process.returncode == 0, process.stderr
    assert "cost" not in rows(output / "summary.csv")[0]
    again = timm.create_model(f"local-dir:{output / 'model'}", pretrained=True)
    assert not graph_stages(again)
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


def test_many_options_together(tmp_path):
    """Each of them leaves its mark; what each does alone is in test_options.py."""
    output = tmp_path / "all"
    process = train(
        *NORMED, "--train-limit", 128, "--val-limit", 40, "--epochs", 3, "--micro-batch", 8, "--opt", "lamb",
        "--layer-decay", 0.8, "--graph-lr-scale", 0.1, "--warmup-epochs", 1, "--sched", "poly", "--clip-grad", 1,
        "--clip-mode", "agc", "--mixup", 0.2, "--cutmix", 1, "--mixup-off-epoch", 2, "--auto-augment", "rand-m5-n2",
        "--reprob", 0.3, "--aug-repeats", 2, "--smoothing", 0.1, "--drop", 0.1, "--drop-path", 0.1, "--ema-decay", 0.99,
        "--grad-checkpointing", "--channels-last", "--mixed-precision", "bf16", "--loss", "bce", "--patience", 9,
        "--head-init-scale", 0.1, "--save-every", 3, "--keep", 1, "--output", output,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "32 images an update (8 x 4 x 1 processes); 3 epochs of 4 updates" in process.stdout
    updates, summary = rows(output / "updates.csv"), rows(output / "summary.csv")
    assert [int(row["update"]) for row in updates] == list(range(1, 13))
    rates = [float(row["lr"]) for row in updates]
    assert rates[:5] == sorted(rates[:5])  # the warm-up of one epoch
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert all(float(row["train_loss"]) < 1 for row in summary)  # binary cross-entropy, averaged over classes
    assert all({"eval_top1", "ema_top1"} <= set(row) for row in summary)
    environment = json.loads((output / "environment.json").read_text(encoding="utf-8"))
    assert environment["mixed_precision"] == "bf16"
    kept = {path.name for path in (output / "checkpoints").glob("update-*")}
    best = max(range(3), key=lambda k: max(float(summary[k][f"{name}_top1"]) for name in ("eval", "ema")))
    assert {"update-00000012-epoch-0003", f"update-{4 * best + 4:08d}-epoch-{best + 1:04d}"} <= kept
    assert all("-epoch-" in name for name in kept)  # those of --save-every made room; a former best goes last


def test_trackers_and_unreadable_images(tmp_path):
    """A damaged file in a folder of images: named, or left out and counted; and TensorBoard is written."""
    image_folder(tmp_path / "images", 20, damaged=8)
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


def test_images_that_are_all_unreadable_in_an_update_do_not_end_the_epoch(tmp_path):
    """Every other image of a shuffled epoch is damaged: some updates of two have none left."""
    image_folder(tmp_path / "images", 20)
    for name in ("one", "two"):
        for file in sorted((tmp_path / "images" / name).iterdir())[::2]:
            file.write_bytes(file.read_bytes()[:50])
    process = train(*NORMED, "--data", tmp_path / "images", "--on-bad-image", "skip", "--batch-size", 2, "--epochs", 1,
                    "--output", tmp_path / "run")  # fmt: skip
    assert process.returncode == 0, process.stderr
    row = rows(tmp_path / "run" / "summary.csv")[0]
    assert row["updates"] == "16"
    assert int(row["skipped_images"]) + int(row.get("eval_skipped_images", 0)) == 20


def test_early_stopping(tmp_path):
    process = train(*PLAIN, "--lr", "0", "--train-limit", 32, "--val-limit", 40, "--epochs", 9, "--patience", 2,
                    "--output", tmp_path / "stale")  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "no better evaluation in 2 epochs" in process.stdout
    assert len(rows(tmp_path / "stale" / "summary.csv")) == 3


@pytest.mark.slow
def test_a_compiled_run(tmp_path):
    """Inductor (it needs a C++ compiler): checkpoints know nothing of it."""
    process = train(*NORMED, "--train-limit", 64, "--val-limit", 40, "--epochs", 1, "--compile", "--ema-decay", 0.9,
                    "--output", tmp_path / "run", timeout=580)  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert set(load_file(tmp_path / "run" / "model" / "model.safetensors")) == set(
        networks.create("dg_test_resnet", num_classes=10).state_dict()
    )


@pytest.mark.slow
def test_blocks_compile_where_a_cost_is_learned(tmp_path):
    """The gates learn as without: a cost is seen that falls, and the checkpoint knows nothing of compilation."""
    process = train("--model", "dg_test_resnet", *TINY, "--train-limit", 64, "--val-limit", 40, "--epochs", 2,
                    "--compile", "--target-cost", 0.7, "--cost-ramp", 0, "--gate-lr-scale", 300, "--ema-decay", 0.9,
                    "--output", tmp_path / "run", timeout=580)  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert float(rows(tmp_path / "run" / "summary.csv")[-1]["train_cost"]) < 0.95
    assert set(load_file(tmp_path / "run" / "model" / "model.safetensors")) == set(
        networks.create("dg_test_resnet", num_classes=10, gates=True).state_dict()
    )


def test_a_converted_network_ends_as_a_cascade_of_the_cost_aimed_at(tmp_path):
    """One cost is all that a user types; what is saved runs the unsure images again, and says what it does."""
    static = timm.create_model("test_resnet", num_classes=10)
    save_file(static.state_dict(), tmp_path / "static.safetensors")
    options = ("--model", "dg_test_resnet", *TINY, "--initial-checkpoint", tmp_path / "static.safetensors",
               "--target-cost", 0.8, "--cost-ramp", 0.2, "--gate-lr-scale", 100,
               "--opt", "adamw", "--lr", 1e-3, "--train-limit", 320, "--epochs", 3,
               "--output", tmp_path / "run")  # fmt: skip
    process = train(*options)
    assert process.returncode == 0, process.stderr
    line = process.stdout.strip().splitlines()[-1]
    found = re.fullmatch(
        r"cost aimed at: 0.8 \(it costs (\S+)\) reached, by a cascade: budgets (\S+) and 1, (\w+) below (\S+) runs "
        r"again, cost \S+; top-1 (\S+) % of the (\d+) images that it was chosen on", line
    )  # fmt: skip
    assert found, line
    assert float(found[1]) <= 0.8
    folder = tmp_path / "run" / "model"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    cascade = config["model_args"]["cascade"]
    assert (f"{cascade['budgets'][0]:g}", cascade["budgets"][1], cascade["certainty"]) == (found[2], 1.0, found[3])
    assert f"budgets {found[2]} and 1, " in (folder / "README.md").read_text(encoding="utf-8")
    judged = json.loads(validate(folder, "--batch-size", 32).stdout)
    assert judged["top1"] == pytest.approx(float(found[5]), abs=0.006)
    assert judged["cost"] == pytest.approx(float(found[1]), abs=6e-4)
    weights = (folder / "model.safetensors").read_bytes()
    again = train(*options, "--resume", "auto")  # finished: nothing learns, and the same cascade is chosen
    assert again.stdout.strip().splitlines()[-1] == line, again.stderr
    assert f"{tmp_path / 'run'} is trained already" in again.stdout
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_gray_image_has_one_channel(tmp_path):
    """The stem, the preprocessing and the saved model agree on it."""
    output = tmp_path / "r"
    process = train(*NORMED, "--in-chans", 1, "--train-limit", 32, "--val-limit", 20, "--epochs", 1, "--output", output)
    assert process.returncode == 0, process.stderr
    assert load_file(output / "model" / "model.safetensors")["conv1.0.weight"].shape[1] == 1
    config = json.loads((output / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32]
    assert len(config["pretrained_cfg"]["mean"]) == 1
    again = networks.create(str(output / "model")).eval()
    assert again(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    shown = validate(output / "model", "--val-limit", 20, "--batch-size", 64)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["top1"] == float(rows(output / "summary.csv")[0]["eval_top1"])


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


def test_training_towards_a_cost(tmp_path):
    """Gates close as the target comes down; what is too dear is not the best."""
    static = timm.create_model("test_resnet", num_classes=10)
    save_file(static.state_dict(), tmp_path / "static.safetensors")
    process = train("--model", "dg_test_resnet", *TINY, "--initial-checkpoint", tmp_path / "static.safetensors",
                    "--target-cost", 0.7, "--no-cascade", "--cost-weight", 100, "--cost-ramp", 0.2,
                    "--gate-lr-scale", 100,
                    "--opt", "adamw", "--lr", 1e-3, "--train-limit", 320, "--epochs", 6,
                    "--output", tmp_path / "run")  # fmt: skip
    assert process.returncode == 0, process.stderr
    table = rows(tmp_path / "run" / "summary.csv")
    assert float(table[-1]["eval_cost"]) < 0.8
    assert float(table[-1]["eval_skipped"]) > 10
    for row in table:
        excess = max(0.0, float(row["eval_cost"]) - 0.7)
        assert float(row["eval_value"]) == pytest.approx(float(row["eval_top1"]) - 100 * excess, abs=1e-6)
    best = max(table, key=lambda row: float(row["eval_value"]))
    assert f"in epoch {best['epoch']};" in process.stdout
    assert re.search(r"blocks have a gate .*; with every gate closed an image costs 0\.\d+", process.stdout)
    last = process.stdout.strip().splitlines()[-1]
    is_reached = float(best["eval_cost"]) <= 0.71
    assert last == f"cost aimed at: 0.7 (it costs {float(best['eval_cost']):.3f}) " + (
        "reached" if is_reached else "NOT reached: train longer, or aim higher"
    )
