"""benchmark.py end to end on small networks, and what it refuses. No time is looked at."""

import json
import re
import shlex

import pytest

from dg_timm.benchmarks import command, options, peaks
from tests.helpers import scripts

SMALL = ["--image-size", "64", "--rounds", "3", "--threads", "1"]


def benchmark(*arguments):
    return command.main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_every_combination_is_a_row(tmp_path):
    out = tmp_path / "times.json"
    done = scripts.run(
        "benchmark.py", "dg_resnet18", *SMALL, "--mode", "inference", "training", "--batch-size", 2, 3, "--layout",
        "nchw", "channels_last", "--json", out, "--plot", tmp_path / "times.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = result["times"]
    assert len({(r["mode"], r["batch_size"], r["layout"]) for r in rows}) == len(rows) == 8
    assert all(r["low"] <= r["ratio"] <= r["high"] and r["rounds"] == 3 and r["limit"] > 1 for r in rows)
    assert done.stdout.count("dg_resnet18") == 8
    assert done.stdout.count("\n|---") == 1  # parts of one table
    assert result["command"].startswith("train_scripts/benchmark.py dg_resnet18")
    assert "(1 of " in result["hardware"]
    assert result["hardware"].endswith("float32")
    assert "dg_timm" in result["software"]
    assert (tmp_path / "times.png").stat().st_size > 5000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["times.json", "times.png"]


@pytest.mark.slow
def test_a_sweep_goes_from_all_blocks_to_few(tmp_path):
    out = tmp_path / "sweep.json"
    assert benchmark("dg_resnet18", *SMALL, "--sweep", "--json", out, "--plot", tmp_path / "sweep.svg") == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    costs = [row["cost"] for row in result["sweep"]]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1 > costs[1]
    assert [row["removed"] for row in result["sweep"]] == list(command.SWEEP)
    assert result["fits"][0]["points"] == len(costs)
    assert (tmp_path / "sweep.svg").read_bytes().startswith(b"<?xml")


def test_the_peak_of_every_network_is_that_of_a_process_of_its_own(tmp_path):
    out = tmp_path / "memory.json"
    ballast = b"x" * 2**29  # held by this process: their figures do not begin with it
    assert benchmark("dg_resnet18:fixed", *SMALL, "--memory", "--mode", "training", "--json", out) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["memory"]
    assert [row["model"] for row in rows] == ["resnet18", "dg_resnet18:fixed"]
    assert all(row["peak_mib"] > row["before_mib"] > 50 for row in rows)
    assert rows[0]["ratio"] == 1
    assert len(ballast) == 2**29


def test_a_process_that_can_not_measure_is_an_error_of_one_line(monkeypatch, capsys):
    monkeypatch.setattr(peaks, "with_static_networks", lambda specs: ["no_such_model"])
    assert benchmark("dg_resnet18", *SMALL, "--memory") == 2
    assert re.fullmatch(r"error: no_such_model could not be measured: .*no_such_model.*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_every_way_to_aggregate_is_a_row(tmp_path):
    out = tmp_path / "aggregation.json"
    assert benchmark("dg_resnet18", *SMALL, "--aggregation", "--json", out, "--plot", tmp_path / "bars.pdf") == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["aggregation"]
    ways = {row["way"] for row in rows}
    assert {"kernels", "reference", "buffer and bmm", "compiled", "gradients: kernels"} <= ways
    assert "forward and backward: compiled" in ways
    assert len(rows) == 4 * len(ways)  # the four shapes of the stages
    assert (tmp_path / "bars.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dg_resnet5"], "dg_resnet5 is not a timm or dg_timm model; do you mean dg_resnet50"),
        ([], "give models, or --zoo"),
        (["dg_resnet18", "--zoo"], "give models, or --zoo"),
        (["dg_resnet18:fast"], "the execution of a dg_ model is one of dense, sparse, fixed"),
        (["dg_resnet18:static"], "the execution of a dg_ model is one of dense, sparse, fixed"),
        (["resnet18:sparse"], "the execution of a dg_ model is one of"),
        (["dg_resnet18", "--batch-size", "0"], "--batch-size: 0 is less than 1"),
        (["dg_resnet18", "--rounds", "2"], "--rounds: 2 is less than 3"),
        (["dg_resnet18", "--image-size", "31"], "--image-size: 31 is less than 32"),
        (["dg_resnet18", "--rounds", "many"], "--rounds: 'many' is not an integer"),
        (["dg_resnet18:sparse", "--removed", "1.5"], "--removed: 1.5 is not between 0 and 1"),
        (["dg_resnet18:sparse", "--mode", "training"], "sparse execution is for inference"),
        (["dg_resnet18:fixed", "--removed", "0.5", "--mode", "training"], "--removed and --sweep are for inference"),
        (["dg_resnet18", "--removed", "0.5"], "dense execution runs what --removed removes"),
        (["dg_resnet18:sparse", "--removed", "0.5", "--memory"], "--memory does not take it"),
        (["dg_resnet18:dense", "--sweep"], "--sweep is for dg_ models in sparse execution"),
        (["resnet18", "--sweep"], "--sweep is for dg_ models"),
        (["resnet18", "--aggregation"], "--aggregation needs a dg_ model"),
        (["dg_resnet18", "--aggregation", "--memory"], "not allowed with argument"),
        (["dg_resnet18", "--plot", "x.xyz"], r"x.xyz must be a file that ends with .png"),
        (["dg_resnet18", "--json", "."], r"must be a file that ends with .json"),
        (["dg_resnet18", "--device", "meta"], "the device is cpu or cuda, got meta"),
        (["dg_resnet18", "--device", "cuda:77"], "cuda:77 can't be used"),
        (["dg_resnet18", "--threads", "100000"], "100000 threads are too many for"),
        (["vit_tiny_patch16_224", "--image-size", "64"], "does not take images of 64 px"),
        (["dg_resnet18", "--json", "nowhere/x.json"], "there is no folder nowhere"),
        (
            ["dg_resnet18", "--batch-size", "9000000"],
            r"does not fit: .* takes at least [\d.]+ GiB.*smaller --batch-size",
        ),
    ],
)
def test_refusals(arguments, message, capsys):
    try:
        status = benchmark(*arguments)
    except SystemExit as end:  # of argparse
        status = end.code
    assert status == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said[-500:]


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert benchmark("dg_resnet18", *SMALL, "--plot", tmp_path / "x.png") == 2
    assert capsys.readouterr().err == "error: --plot needs matplotlib: pip install 'dg-timm[plots]'\n"


def test_every_command_of_measure_performance_is_understood(monkeypatch):
    monkeypatch.chdir(scripts.ROOT)
    script = (scripts.SCRIPTS / "measure_performance.sh").read_text(encoding="utf-8")
    lines = [line for line in script.splitlines() if line.startswith("run ")]
    assert len(lines) >= 14
    for line in lines:
        line = line.replace("$both", "--layout nchw channels_last").replace("$out", "results/performance")
        args = options.parse(shlex.split(line)[2:], None)
        assert options.specs_of(args)
        assert options.settings_of(args)
    assert re.search(r'train_scripts/benchmark.py "\$@" --json "\$out/\$name.json"', script)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 byte")])
def test_a_lack_of_memory_is_a_line(monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(command, "measure_times", fail)
    assert benchmark("dg_resnet18", *SMALL) == 2
    assert re.fullmatch(r"error: out of memory.*: use a smaller --batch-size\n", capsys.readouterr().err)


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise ValueError("a defect")

    monkeypatch.setattr(command, "measure_times", fail)
    with pytest.raises(ValueError, match="a defect"):
        benchmark("dg_resnet18", *SMALL)
