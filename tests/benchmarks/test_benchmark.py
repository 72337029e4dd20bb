"""benchmark.py end to end on small networks, and what it refuses. No time is looked at."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "train_scripts"
from dg_timm.benchmarks import networks as benchmark_models
from dg_timm.benchmarks import report as benchmark_report

SMALL = ["--image-size", "64", "--rounds", "3", "--threads", "1"]
SETTING = dict(mode="inference", batch_size=3, image_size=64, layout="nchw", dtype="float32", compile=False,
               device="cpu", edges="open", removed=None)  # fmt: skip


def benchmark(*arguments: object, fails: bool = False) -> str:
    command = [sys.executable, SCRIPTS / "benchmark.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


def test_every_combination_is_a_row(tmp_path):
    out = tmp_path / "times.json"
    printed = benchmark(
        "dg_resnet18", *SMALL, "--mode", "inference", "training", "--batch-size", 2, 3, "--layout", "nchw",
        "channels_last", "--json", out, "--plot", tmp_path / "times.png",
    )  # fmt: skip
    result = json.loads(out.read_text())
    rows = result["times"]
    assert len({(r["mode"], r["batch_size"], r["layout"]) for r in rows}) == len(rows) == 8
    assert all(r["low"] <= r["ratio"] <= r["high"] and r["rounds"] == 3 and r["limit"] > 1 for r in rows)
    assert printed.count("dg_resnet18") == 8
    assert result["command"].startswith("train_scripts/benchmark.py dg_resnet18")
    assert "1 threads" in result["hardware"]
    assert (tmp_path / "times.png").stat().st_size > 5000
    assert not list(tmp_path.glob("*.tmp*"))


def test_sweep_memory_and_aggregation(tmp_path):
    sweep, memory, alone = (tmp_path / f"{name}.json" for name in ("sweep", "memory", "aggregation"))
    benchmark("dg_resnet18", *SMALL, "--sweep", "--json", sweep, "--plot", tmp_path / "sweep.png")
    result = json.loads(sweep.read_text())
    costs = [row["cost"] for row in result["sweep"]]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1 > costs[1]
    assert result["fits"][0]["points"] == len(costs)
    benchmark("dg_resnet18", *SMALL, "--memory", "--mode", "training", "--json", memory)
    rows = json.loads(memory.read_text())["memory"]
    assert [row["model"] for row in rows] == ["resnet18", "dg_resnet18"]
    assert all(row["peak_mib"] > row["before_mib"] > 50 for row in rows)
    assert rows[0]["ratio"] == 1
    benchmark("dg_resnet18", *SMALL, "--aggregation", "--json", alone)
    ways = {row["way"] for row in json.loads(alone.read_text())["aggregation"]}
    assert {"kernels", "reference", "buffer and bmm", "compiled", "gradients: kernels"} <= ways


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dg_resnet5"], "there is no model 'dg_resnet5'; near it: .*dg_resnet50"),
        ([], "give models, or --zoo"),
        (["dg_resnet18:fast"], "the execution of a dg_ model is one of dense, sparse, static"),
        (["resnet18:sparse"], "the execution of a dg_ model is one of"),
        (["dg_resnet18", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["dg_resnet18", "--rounds", "2"], "--rounds must be at least 3, got 2"),
        (["dg_resnet18:sparse", "--removed", "1.5"], "--removed is a share from 0 to 1, got 1.5"),
        (["dg_resnet18:sparse", "--removed", "0.5", "--mode", "training"], "sparse execution is for inference"),
        (["dg_resnet18:static", "--removed", "0.5", "--mode", "training"], "--removed and --sweep are for inference"),
        (["dg_resnet18", "--removed", "0.5"], "dense execution runs what --removed removes"),
        (["dg_resnet18:dense", "--sweep"], "--sweep is of dg_ models in sparse execution"),
        (["resnet18", "--sweep"], "--sweep is of dg_ models"),
        (["resnet18", "--aggregation"], "--aggregation needs a dg_ model"),
        (["dg_resnet18", "--plot", "x.xyz"], r"x.xyz must be a file that ends with .png"),
        (["dg_resnet18", "--json", "."], r"must be a file that ends with .json"),
        (["dg_resnet18", "--device", "meta"], "--device is cpu or cuda, got meta"),
        (["dg_resnet18", "--threads", "100000"], "--threads 100000 on"),
        (["vit_tiny_patch16_224", "--image-size", "64"], "does not take images of 64 px"),
        (["dg_resnet18", "--device", "cuda:7"], "--device cuda:7 can't be used"),
        (["dg_resnet18", "--json", "nowhere/x.json"], "there is no folder nowhere"),
        (
            ["dg_resnet18", "--batch-size", "9000000"],
            r"does not fit: .* takes at least [\d.]+ GiB.*smaller --batch-size",
        ),
    ],
)
def test_refusals(arguments, message):
    said = benchmark(*arguments, fails=True)
    assert re.search(message, said), said[-500:]


def test_a_model_that_predicts_something_else_is_not_timed(monkeypatch):
    from dg_timm.execution import aggregation

    right = aggregation.gather
    with torch.no_grad():
        benchmark_models.measure(["dg_resnet18"], SETTING, 3)
        monkeypatch.setattr(aggregation, "gather", lambda sources, weights: 1.01 * right(sources, weights))
        with pytest.raises(benchmark_models.Refused, match="does not predict as its static twin; it is not timed"):
            benchmark_models.measure(["dg_resnet18"], SETTING, 3)
        # right where only the chain carries, wrong where more do
        monkeypatch.setattr(aggregation, "gather", lambda sources, weights: right(sources[-1:], weights[:, -1:]))
        with pytest.raises(benchmark_models.Refused, match="does not predict as the reference formulas"):
            benchmark_models.measure(["dg_resnet18"], SETTING, 3)


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    from dg_timm.execution import aggregation

    training = {**SETTING, "mode": "training"}
    benchmark_models.measure(["dg_resnet18"], training, 3)
    right = aggregation.fan_out_gradients

    def wrong(*args, **options):
        dx, dw = right(*args, **options)
        return dx if dx is None else -dx, dw

    monkeypatch.setattr(aggregation, "fan_out_gradients", wrong)
    with pytest.raises(benchmark_models.Refused, match="the gradient of dg_resnet18 is not that of the reference"):
        benchmark_models.measure(["dg_resnet18"], training, 3)


def test_a_line_for_every_image_size_and_a_bar_for_every_row(tmp_path):
    common = dict(model="m", mode="i", batch_size=1, layout="nchw", dtype="f", low=0.1, high=1.0)
    rows = [dict(common, image_size=px, cost=c, ratio=px * c) for px in (1, 2) for c in (0.2, 0.5, 1)]
    fits = benchmark_report.fits(rows)
    assert [(fit["image_size"], fit["slope"]) for fit in fits] == [(1, 1.0), (2, 2.0)]
    drawn = []
    from matplotlib.axes import Axes

    monkey = pytest.MonkeyPatch()
    monkey.setattr(Axes, "barh", lambda self, places, values, **options: drawn.extend(values))
    benchmark_report.plot(tmp_path / "bars.png", {"times": rows + rows})
    monkey.undo()
    assert len(drawn) == 12


def test_imposed_paths_follow_the_parts_of_a_batch(monkeypatch):
    from dg_timm.graph import stage

    monkeypatch.setattr(stage, "LIVE_BYTES", 2**16)
    for execution in ("dg_resnet18", "dg_resnet18:sparse", "dg_resnet18:static"):
        rows = benchmark_models.measure([execution], {**SETTING, "batch_size": 7, "removed": 0.5}, 3)
        assert 0.3 < rows[0]["cost"] < 0.9


def test_a_line_through_exact_points():
    common = dict(model="m", mode="i", batch_size=1, image_size=9, layout="nchw", dtype="f")
    rows = [dict(common, cost=c, ratio=0.1 + 0.9 * c) for c in (0.2, 0.5, 1)]
    (fit,) = benchmark_report.fits(rows)
    assert (fit["slope"], fit["intercept"], fit["r_squared"]) == (0.9, 0.1, 1.0)
