"""Gates, ranges and fixed networks beside the static one: which trials there are, and what is made of their figures."""

import json
import math
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from dg_timm.experiments.skipping import Plan, collect_rows, write_table
from dg_timm.experiments.trial import Result, Trial
from tests.helpers.scripts import rows, run


def result(name, seed, **figures):
    return Result(Trial(name, {}, seed), figures, 1.0, "a machine", Path("nowhere"))


def test_every_network_starts_from_the_same_static_one_and_learns_its_logits():
    plan = Plan("tf_efficientnet_lite0", Path("w.safetensors"), {"image-size": 64})
    start = plan.start(3)
    assert start.options["initial-checkpoint"] == Path("w.safetensors")
    longer, gates, whole = plan.longer(start), plan.gates(start, 0.7), plan.range(start)
    assert longer.depends_on == {"initial-checkpoint": start, "distill": start}
    assert gates.depends_on == whole.depends_on == {"initial-checkpoint": start}  # its static network is the teacher
    assert (gates.name, gates.options["target-cost"], gates.options["model"]) == (
        "gates-0.7", 0.7, "dg_tf_efficientnet_lite0"
    )  # fmt: skip
    assert "target-cost" not in whole.options  # the recipe's range
    assert all(trial.seed == 3 and trial.options["image-size"] == 64 for trial in (longer, gates, whole))


def test_a_range_has_two_rows_and_differences_are_of_the_same_seeds():
    found = [
        result("static", 0, eval_top1=90.0, eval_loss=0.3),
        result("static", 1, eval_top1=92.0, eval_loss=0.3),
        result("range", 0, **{"eval_top1": 91.0, "eval_loss": 0.2, "eval_cost": 0.9, "eval_spread": 0.1,
                              "eval_top1@0.6": 88.0, "eval_loss@0.6": 0.4, "eval_cost@0.6": 0.65,
                              "eval_spread@0.6": 0.05}),
        result("gates-0.7", 1, eval_top1=91.5, eval_loss=0.2, eval_cost=0.71, eval_spread=0.02),
    ]  # fmt: skip
    found.append(result("fixed-0.7", 1, eval_top1=91.0, eval_loss=0.2, cost=1.01))  # no cost was aimed at
    listed = collect_rows(found, {"fixed-0.7-1": 0.7})
    assert [row["network"] for row in listed] == ["static", "static", "range", "range@0.6", "gates-0.7", "fixed-0.7"]
    assert [row["cost"] for row in listed] == pytest.approx([1.0, 1.0, 0.9, 0.65, 0.71, 0.707])
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in write_table(listed, "static").splitlines()[2:]}  # fmt: skip
    assert lines["static"] == ["1.000", "0.000", "91.00", "", "0.300", "2"]
    assert lines["range"][3] == "+1.00"  # above seed 0
    assert lines["range@0.6"][3] == "-2.00"
    assert lines["gates-0.7"] == ["0.710", "0.020", "91.50", "-0.50", "0.200", "1"]  # below seed 1


@pytest.mark.slow
def test_from_weights_to_the_table(tmp_path):
    save_file(timm.create_model("cifar_resnet20", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    words = ("experiments/skipping.py", "--data", "digits", "--model", "cifar_resnet20",
             "--weights", tmp_path / "w.safetensors", "--seeds", 0, "--target-cost", 0.8,
               "--set", "epochs=1", "warmup-epochs=0", "train-limit=64", "val-limit=64", "batch-size=32",
               "image-size=32", "--output", tmp_path / "out", "--results", tmp_path / "results")  # fmt: skip
    done = run(*words)
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path / "results" / "skipping.csv")
    assert [row["network"] for row in table] == [
        "static", "gates-0.8", "range", "range@0.6", "fixed-0.8", "shallow-0.8", "random-0.8"
    ]  # fmt: skip
    assert all(math.isfinite(float(row["loss"])) for row in table)
    left_out = json.loads((tmp_path / "out" / "gates-0.8-0-fixed" / "config.json").read_text(encoding="utf-8"))
    is_whole = not left_out["model_args"].get("skipped_blocks")
    assert (float(table[4]["cost"]) >= 1) == is_whole  # relative to the static network with all blocks
    timed = run(*words, "--time", "--rounds", 2, "--time-batch", 2)
    assert timed.returncode == 0, timed.stderr
    times = {row["network"]: float(row["time_2"]) for row in rows(tmp_path / "results" / "times-1.csv")}
    assert {"gates-0.8", "fixed-0.8", "range, budget 0.6", "range, every gate open"} <= set(times)
    assert all(ratio > 0 for ratio in times.values())
    observed = rows(tmp_path / "results" / "images.csv")
    assert {"budget 1", "budget 0.6"} <= {row["how"] for row in observed if row["network"] == "range"}
    assert float(observed[0]["top1"]) == pytest.approx(float(table[1]["top1"]))  # of the same images
    assert (tmp_path / "results" / "skipping.png").stat().st_size > 1000
