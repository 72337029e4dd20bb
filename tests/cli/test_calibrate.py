"""calibrate.py as a user runs it: the curve of a trained network, and the network at a budget."""

import argparse
import json

import pytest
import timm
import torch
from PIL import Image

import dg_timm
from dg_timm.execution.cascade import cascade_of
from dg_timm.graph.stage import routers
from dg_timm.training.data.images import Batch
from dg_timm.training.run import operating_points
from tests.helpers.networks import gated_network
from tests.helpers.scripts import rows, run


def test_the_curve_of_a_network_is_measured_in_turn():
    model = timm.create_model("dg_cifar_resnet20", num_classes=3).eval()
    images = torch.randn(32, 3, 16, 16)
    batch = Batch(images, torch.zeros(32, dtype=torch.long), torch.ones(32), torch.zeros(32, 2), [], [])
    models = operating_points.at_thresholds(model, [0.0, 3.0], [images])
    static = operating_points.make_static(model)
    curve = operating_points.measure_curve(models, static, [batch], time_batch=[8], rounds=2)
    assert [row["threshold"] for row in curve] == ["learned", "0.0", "3.0"]
    assert curve[1]["cost"] > 1 > curve[2]["cost"]
    assert all(row["time_8_low"] <= row["time_8"] <= row["time_8_high"] for row in curve)
    assert all(row["time_8_ms"] > 0 < row["time_8_static_ms"] for row in curve)
    assert len(operating_points.curve_table(curve).splitlines()) == 5
    assert all(router.fixed_threshold is None for router in routers(model).values())


@pytest.mark.slow
def test_calibrate_prints_the_curve_and_meets_a_budget(tmp_path):
    done = run("train.py", "--data", "digits", "--model", "dg_cifar_resnet20", "--image-size", 16, "--epochs", 1,
               "--train-limit", 64, "--val-limit", 64, "--workers", 0, "--output", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    common = ("calibrate.py", tmp_path / "run", "--data", "digits", "--val-limit", 64, "--rounds", 2, "--threads", 1)
    shown = run(*common, "--thresholds", 0, 0.4, 3, "--time-batch", 8, "--target-cost", 0.7, "--refit-norms", 64,
                "--max-drop", 100, "--csv", tmp_path / "curve.csv", "--plot", tmp_path / "curve.png",
                "--save", tmp_path / "at_0.7")  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    curve = rows(tmp_path / "curve.csv")
    assert [row["threshold"] for row in curve] == ["learned", "0.0", "0.4", "3.0"]
    costs = [float(row["cost"]) for row in curve[1:]]
    assert costs == sorted(costs, reverse=True)
    assert all(float(row["time_8"]) > 0 for row in curve)
    assert (tmp_path / "curve.png").stat().st_size > 1000
    chosen = json.loads(shown.stdout.splitlines()[-1])
    assert chosen["cost"] <= 0.7
    kept = run("calibrate.py", tmp_path / "at_0.7", *common[2:], "--thresholds", 9, "--time-batch", "--csv",
               tmp_path / "kept.csv")  # fmt: skip
    assert kept.returncode == 0, kept.stderr
    again = rows(tmp_path / "kept.csv")[0]
    assert (again["threshold"], float(again["cost"])) == ("learned", chosen["cost"])
    assert float(again["top1"]) == chosen["top1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--thresholds", 0, "--time-batch", "--target-cost", 0.01), "no threshold of the curve keeps to 0.01"),
        (("--time-batch", "--target-time", 0.5), "--target-time needs a --time-batch"),
        (("--save", "x"), "give --target-cost or --target-time"),
        (("--target-cost", 0.7, "--save", "FULL"), "is there already; give a new folder"),
        (("--time-batch", 999), "a batch of 999 can't be timed with 64 images"),
    ],
)
def test_a_budget_that_can_not_be_met_is_refused(more, message, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    words = [tmp_path / "full" if word == "FULL" else word for word in more]
    dg_timm.save_pretrained(timm.create_model("dg_cifar_resnet20"), tmp_path / "net")
    refused = run("calibrate.py", tmp_path / "net", "--data", "digits", "--val-limit", 64, "--rounds", 2,
                  "--threads", 1, *words)  # fmt: skip
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_of_gates_a_budget_or_cascade_is_chosen_and_saved(tmp_path):
    model, _ = gated_network()
    dg_timm.save_pretrained(model.float(), tmp_path / "net")
    common = ("calibrate.py", tmp_path / "net", "--data", "digits", "--image-size", 32, "--val-limit", 64)
    done = run(*common, "--budgets", 0, 0.5, 1, "--max-drop", 5, "--csv", tmp_path / "curve.csv",
               "--save", tmp_path / "kept")  # fmt: skip
    assert done.returncode == 0, done.stderr
    curve = rows(tmp_path / "curve.csv")
    assert [row["budget"] for row in curve] == ["0.0", "0.5", "1.0"]
    assert all(float(row["milliseconds"]) > 0 for row in curve)
    chosen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert chosen["drop"] <= 5
    assert chosen["cost"] <= float(curve[-1]["cost"])
    loaded = timm.create_model(f"local-dir:{tmp_path / 'kept'}", pretrained=True)
    assert [point.budget for point in dg_timm.budget_curve(loaded)] == [0.0, 0.5, 1.0]
    kept = cascade_of(loaded)
    assert (None if kept is None else list(kept.budgets)) == (chosen["budgets"] if chosen["threshold"] else None)
    refused = run(*common, "--thresholds", 0.5)
    assert refused.returncode == 2
    assert "and --thresholds are for thresholds" in refused.stderr


def test_of_a_folder_of_held_out_images_all_are_evaluated_on(tmp_path, capsys):
    for k in range(20):
        place = tmp_path / "val" / str(k % 2) / f"{k}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (12 * k, 0, 0)).save(place)
    model = timm.create_model("dg_cifar_resnet20", num_classes=2).eval()
    parser = argparse.ArgumentParser()
    operating_points.add_options(parser)
    for norms, evaluated in ((0, 20), (8, 4)):  # with norms to refit, some are set aside
        args = parser.parse_args(["--data", str(tmp_path), "--refit-norms", str(norms)])
        batches, refit = operating_points.load_batches(argparse.Namespace(model="it", **vars(args)), model)
        assert sum(int((batch.sample_mask > 0).sum()) for batch in batches) == evaluated
        assert sum(map(len, refit)) == norms
        assert f"{evaluated} images to evaluate on" in capsys.readouterr().err
