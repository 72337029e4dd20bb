"""Experiments end to end on scikit-learn's digits: trainings happen once, a rerun gives the same table."""

import argparse
import csv
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from scipy import stats

from dg_timm.cli import calibrate
from dg_timm.experiments import ablation, budgets, finetuning
from dg_timm.experiments import runner as cells_module
from dg_timm.experiments.comparison import table
from dg_timm.experiments.runner import Cell, Result, paired, parse, run
from dg_timm.graph.stage import routers
from dg_timm.training.data.loading import Batch

SCRIPTS = Path(__file__).parents[2] / "train_scripts"
TINY = ["--set", "epochs=1", "warmup-epochs=0", "train-limit=64", "val-limit=64", "batch-size=32", "image-size=16"]


def script(*command):
    full = [sys.executable, str(SCRIPTS / command[0]), *map(str, command[1:])]
    return subprocess.run(full, capture_output=True, text=True, check=False, timeout=600)


def rows_of(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def options(tmp_path, *more):
    given = ["--data", "digits", "--output", f"{tmp_path}/out", "--results", f"{tmp_path}/kept", *more]
    return parse(argparse.ArgumentParser(), "x", "more", given)


def test_the_full_size_has_folders_of_its_own():
    small, full = (parse(argparse.ArgumentParser(), "x", "more", ["--data", "d", *more]) for more in ([], ["--full"]))
    assert (small.results.name, full.results.name) == ("x", "x_full")
    assert (small.output.name, full.output.name) == ("x", "x_full")


def keep(args, cell, **changed):
    options = {**cells_module._Bench(args).options(cell), **changed}
    kept = {"options": options, "figures": {"eval_top1": 50.0 + cell.seed}, "seconds": 1.0, "hardware": "none"}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{cell.folder}.json").write_text(json.dumps(kept))


def test_paired_differences_have_students_interval():
    values, base = {0: 1.0, 1: 3.0, 2: 2.0, 7: 9.0}, {0: 0.0, 1: 1.0, 2: 2.0}
    mean, low, high, n = paired(values, base)
    wanted = stats.t.interval(0.95, 2, loc=1.0, scale=stats.sem([1.0, 2.0, 0.0]))
    assert (mean, n) == (1.0, 3)
    assert (low, high) == pytest.approx(wanted)
    assert all(math.isnan(end) for end in paired({0: 1.0}, base)[1:3])


def test_finished_cells_are_read_and_never_trained_again(tmp_path, monkeypatch):
    args = options(tmp_path)
    done = [Cell("a", {"model": "x"}, seed) for seed in (0, 1)]
    for cell in done:
        keep(args, cell)
    monkeypatch.setattr(cells_module._Bench, "train", lambda *_: pytest.fail("trained again"))
    assert [result.figures["eval_top1"] for result in run(done, args)] == [50.0, 51.0]
    args.collect = True
    assert len(run([*done, Cell("b")], args)) == 2  # what is not finished is left out


def test_results_of_other_options_are_refused(tmp_path):
    args = options(tmp_path)
    cell = Cell("a", {"model": "x"})
    keep(args, cell, model="y")
    with pytest.raises(ValueError, match=r"of other options \(model: y there, x now\); give another --results"):
        run([cell], args)
    keep(args, cell)
    args.data = "uoft-cs/cifar10"
    with pytest.raises(ValueError, match="data: digits there, uoft-cs/cifar10 now"):
        run([cell], args)
    (args.results / "a-0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a-0\.json is no result of a cell .*; move it away"):
        run([cell], args)
    with pytest.raises(ValueError, match="two cells have one name"):
        run([Cell("b"), Cell("b")], args)


def test_what_a_cell_starts_from_is_trained_again_only_if_its_network_is_gone(tmp_path, monkeypatch):
    args = options(tmp_path)
    first = Cell("first", {"model": "x"})
    keep(args, first)
    trained = []
    monkeypatch.setattr(cells_module._Bench, "train", lambda self, cell: trained.append(cell.folder) or "")
    second = Cell("second", {"model": "x"}, 0, {"initial-checkpoint": first})
    run([first, second], args)
    assert trained == ["first-0", "second-0"]  # in this order
    trained.clear()
    (args.output / "first-0" / "run" / "checkpoints" / "last").mkdir(parents=True)
    run([first, second], args)
    assert trained == ["first-0", "second-0"]  # the run was not finished
    trained.clear()
    (args.output / "first-0" / "finished.json").write_text(json.dumps(cells_module._Bench(args).options(first)))
    run([first, second], args)
    assert trained == ["second-0"]
    keep(args, second)
    trained.clear()
    run([first, second], args)
    assert trained == []
    run([first, second], args, networks=True)
    assert trained == ["second-0"]


def test_what_needs_a_cell_that_failed_is_not_trained(tmp_path, monkeypatch):
    args = options(tmp_path)
    trained = []

    def train(self, cell):
        trained.append(cell.folder)
        return "failed (1)" if cell.name == "first" else ""

    monkeypatch.setattr(cells_module._Bench, "train", train)
    first = Cell("first")
    second = Cell("second", {}, 0, {"distill": first})
    third = Cell("third", {}, 0, {"initial-checkpoint": second})
    with pytest.raises(RuntimeError, match=r"first-0 failed \(1\); second-0 needs first-0; third-0 needs second-0"):
        run([first, second, third, Cell("other")], args)
    assert trained == ["first-0", "other-0"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--set", "epochs"], "give OPTION=VALUE"),
        (["--jobs", "0"], "--jobs"),
        (["--seeds", "0", "0"], "a seed stands twice"),
        (["--seeds", "-1"], "--seeds"),
        (["--output", __file__], "is no folder"),
        (["--collect"], "error: no cell is finished in"),
        (["--set", "epochz=1"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_named_without_a_traceback(given, said, tmp_path):
    common = [
        "--data",
        "digits",
        "--results",
        str(tmp_path / "r"),
        *([] if "--output" in given else ["--output", str(tmp_path / "o")]),
    ]
    command = [sys.executable, SCRIPTS / "experiments" / "ablation.py", *common, "--only", "static", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "r").glob("*"))


def test_a_table_is_not_overwritten_by_one_with_fewer_networks(tmp_path):
    file = tmp_path / "budgets.csv"
    file.write_text("network,point\na,learned\na,0.1\nb,\n")
    budgets.keep_rows(file, {"a", "b", "c"})
    with pytest.raises(ValueError, match=r"budgets\.csv holds b, which these options leave out"):
        budgets.keep_rows(file, {"a"})


@pytest.mark.slow
def test_sigterm_reaches_the_trainings_and_the_same_command_goes_on(tmp_path):
    more = [
        "--set",
        "epochs=40",
        "warmup-epochs=0",
        "train-limit=256",
        "val-limit=64",
        "batch-size=32",
        "image-size=16",
    ]
    common = [
        "--data",
        "digits",
        "--results",
        tmp_path / "r",
        "--output",
        tmp_path / "o",
        "--only",
        "static",
        "--seeds",
        "0",
    ]
    command = [sys.executable, SCRIPTS / "experiments" / "ablation.py", *common, *more]
    with (tmp_path / "said").open("w") as said:
        first = subprocess.Popen(command, stderr=said)
    log = tmp_path / "o" / "static-0" / "log.txt"
    while not (log.exists() and "epoch 2" in log.read_text()):
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 128 + signal.SIGTERM
    assert "the same command goes on" in (tmp_path / "said").read_text()
    assert "stopped by signal 15; saved" in log.read_text()
    assert not (tmp_path / "r").exists()
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "r" / "static-0.json").exists()


def test_cells_that_fail_are_named_after_the_others_are_done(tmp_path):
    args = options(tmp_path, "--jobs", "2")
    with pytest.raises(
        RuntimeError,
        match=r"wrong-0 failed \(2\): error: no_such_model is no .*; no_data-0 failed \(2\): error: /no/such/folder",
    ):
        run([Cell("wrong", {"model": "no_such_model"}), Cell("no_data", {"data": "/no/such/folder"})], args)
    assert "no_such_model" in (args.output / "wrong-0" / "log.txt").read_text()


def test_the_table_has_every_seed_mean_and_interval(tmp_path):
    results = [
        Result(Cell(name, {}, seed), {"eval_top1": top1}, 60.0, "two cores", tmp_path)
        for name, row in {"static": (70.0, 71.0, 72.0), "alpha": (71.0, 71.5, 73.5)}.items()
        for seed, top1 in enumerate(row)
    ]
    text = table(results, {"static": "static", "alpha": "learned", "none": "not run"}, "static")
    assert "| learned | 71.00 | 71.50 | 73.50 | 72.00 | +1.00 (-0.24 to +2.24) | 3 | 60 |" in text
    assert "not run" not in text


def test_every_experiment_has_its_cells():
    names = list(ablation.VARIANTS)
    found = ablation.cells([0, 1, 2], names, "cifar10_scratch")
    assert len({cell.folder for cell in found}) == 3 * len(names)
    wired = [cell for cell in found if "topology" in cell.options.get("model-kwargs", {})]
    assert all(cell.options["model-kwargs"]["topology_seed"] == cell.seed for cell in wired)
    chained = budgets.cells(budgets.NAMES, 0, [0.5, 0.4], False)
    assert len({cell.folder for cell in chained}) == len(chained) == 11
    assert all(other in chained for cell in chained for other in cell.networks.values())
    full = budgets.cells(budgets.NAMES, 0, [0.5, 0.4], True)
    assert not any(cell.networks for cell in full)
    assert [cell.options.get("target-cost") for cell in full][:3] == [0.5, 0.4, None]
    distilled = budgets.cells(budgets.NAMES, 0, [0.5], True, distill=True)[-2:]
    assert [set(cell.networks) for cell in distilled] == [{"initial-checkpoint"}, {"initial-checkpoint", "distill"}]
    assert {cell.networks["distill"].name for cell in distilled[1:]} == {"cifar_resnet26"}
    weights = Path("some/weights.safetensors")
    assert {cell.options["initial-checkpoint"] for cell in finetuning.cells([0], weights, False)} == {weights}


@pytest.mark.slow
def test_an_experiment_runs_and_a_rerun_of_a_cell_gives_its_csv(tmp_path):
    command = ("experiments/ablation.py", "--data", "digits", "--only", "static", "alpha", "ws", "--seeds", 0, 1, *TINY)
    first = script(*command, "--output", tmp_path / "a", "--results", tmp_path / "ra")
    assert first.returncode == 0, first.stdout + first.stderr
    assert (tmp_path / "ra" / "ablation.png").stat().st_size > 1000
    table_ = (tmp_path / "ra" / "ablation.csv").read_bytes()
    assert len(rows_of(tmp_path / "ra" / "ablation.csv")) == 6
    (tmp_path / "ra" / "alpha-1.json").unlink()
    again = script(*command, "--output", tmp_path / "b", "--results", tmp_path / "ra")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("begins") == 1
    assert (tmp_path / "ra" / "ablation.csv").read_bytes() == table_


@pytest.mark.slow
def test_the_curve_of_budgets_and_the_paths_of_images(tmp_path):
    places = ("--output", tmp_path / "out", "--results", tmp_path / "kept")
    done = script("experiments/budgets.py", "--data", "digits", "--only", "dg_cifar_resnet26", "cifar_resnet26", "skip",
                  "cifar_resnet14", "--target-cost", 0.5, "--points", 3, "--rounds", 2, *places, *TINY)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "kept" / "budgets.csv")
    assert [row["network"] for row in rows].count("dg_cifar_resnet26-0.5") == 4
    assert [row["network"] for row in rows].count("skip") == 4
    costs = {row["network"]: float(row["cost"]) for row in rows}
    assert costs["cifar_resnet26"] == 1.0
    assert costs["cifar_resnet14"] == pytest.approx(0.485, abs=0.01)
    assert not any("time" in key for key in rows[0])
    looked = script("experiments/paths.py", "--data", "digits", "--static", tmp_path / "out" / "cifar_resnet26-0",
                    "--model", tmp_path / "out/dg_cifar_resnet26-0.5-0/run/checkpoints/last",
                    "--results", tmp_path / "paths")  # fmt: skip
    assert looked.returncode == 0, looked.stdout + looked.stderr
    tenths = rows_of(tmp_path / "paths" / "difficulty.csv")
    assert sum(int(row["images"]) for row in tenths) == 360
    losses = [float(row["static_loss"]) for row in tenths]
    assert losses == sorted(losses)
    assert (tmp_path / "paths" / "wiring.png").stat().st_size > 1000


@pytest.mark.slow
def test_calibrate_prints_the_curve_and_meets_a_budget(tmp_path):
    done = script("train.py", "--data", "digits", "--model", "dg_cifar_resnet20", "--image-size", 16, "--epochs", 1,
                  "--train-limit", 64, "--val-limit", 64, "--workers", 0, "--output", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    common = ("calibrate.py", tmp_path / "run", "--data", "digits", "--val-limit", 64, "--rounds", 2, "--threads", 1)
    shown = script(*common, "--thresholds", 0, 0.4, 3, "--time-batch", 8, "--target-cost", 0.7, "--refit-norms", 64,
                   "--csv", tmp_path / "curve.csv", "--plot", tmp_path / "curve.png",
                   "--save", tmp_path / "at_0.7")  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    rows = rows_of(tmp_path / "curve.csv")
    assert [row["threshold"] for row in rows] == ["learned", "0.0", "0.4", "3.0"]
    costs = [float(row["cost"]) for row in rows[1:]]
    assert costs == sorted(costs, reverse=True)
    assert all(float(row["time_8"]) > 0 for row in rows)
    chosen = json.loads(shown.stdout.splitlines()[-1])
    assert chosen["cost"] <= 0.7
    kept = script("calibrate.py", tmp_path / "at_0.7", *common[2:], "--thresholds", 9, "--time-batch", "--csv",
                  tmp_path / "kept.csv")  # fmt: skip
    assert kept.returncode == 0, kept.stderr
    again = rows_of(tmp_path / "kept.csv")[0]
    assert (again["threshold"], float(again["cost"])) == ("learned", chosen["cost"])
    assert float(again["top1"]) == chosen["top1"]
    assert (tmp_path / "curve.png").stat().st_size > 1000
    for more, message in (
        (("--thresholds", 0, "--time-batch", "--target-cost", 0.01), "no threshold of the curve keeps to 0.01"),
        (("--time-batch", "--target-time", 0.5), "--target-time needs a --time-batch"),
        (("--save", tmp_path / "x"), "give --target-cost or --target-time"),
        (("--target-cost", 0.7, "--save", tmp_path / "at_0.7"), "is there already; give a new folder"),
        (("--time-batch", 999), "a batch of 999 can't be timed with 64 images"),
    ):
        refused = script(*common, *more)
        assert refused.returncode == 2
        assert message in refused.stderr
    static = script("calibrate.py", "cifar_resnet20", "--data", "digits")
    assert static.returncode == 2


def test_the_budget_takes_the_most_accurate_row_that_keeps_to_it():
    rows = [{"top1": 90.0, "cost": 0.9}, {"top1": 88.0, "cost": 0.5}, {"top1": 70.0, "cost": 0.4}]
    assert calibrate.within(rows, 0.6, ["cost"]) is rows[1]


def test_the_curve_of_a_network_is_measured_in_turn():
    torch.manual_seed(0)
    model = timm.create_model("dg_cifar_resnet20", num_classes=3).eval()
    images = torch.randn(32, 3, 16, 16)
    batch = Batch(images, torch.zeros(32, dtype=torch.long), torch.ones(32), torch.zeros(32, 2), [], [])
    by_threshold = calibrate.variants(model, [0.0, 3.0], [images])
    rows = calibrate.curve(by_threshold, calibrate.static_twin(model), [batch], time_batch=[8], rounds=2)
    assert [row["threshold"] for row in rows] == ["learned", "0.0", "3.0"]
    assert rows[1]["cost"] > 1 > rows[2]["cost"]
    assert all(row["time_8_low"] <= row["time_8"] <= row["time_8_high"] for row in rows)
    assert all(row["time_8_ms"] > 0 < row["time_8_static_ms"] for row in rows)
    assert len(calibrate.table(rows).splitlines()) == 5
    assert calibrate.thresholds_of(model, images, 4)[0] == 0.0
    assert all(router.fixed_threshold is None for router in routers(model).values())
