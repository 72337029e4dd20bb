"""measure_training.py: the training loop beside a plain one, and its memory over a stream."""

import argparse
import json
import subprocess
import sys
import tarfile

import pytest
from matplotlib.image import imread

from dg_timm._errors import BadState
from dg_timm.benchmarks import streaming, training


@pytest.mark.slow
def test_both_loops_train_and_are_compared(capsys):
    assert training.main(["throughput", "--models", "dg_cifar_resnet20", "--image-size", "16", "--batch-size", "16",
                          "--rounds", "2", "--updates", "1"]) == 0  # fmt: skip
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["model"] == "dg_cifar_resnet20"
    assert (row["rounds"], row["updates_a_round"]) == (2, 1)
    assert row["trainer_images_per_second"] > 0 < row["plain_images_per_second"]
    assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]


def test_shards_hold_every_image_once(tmp_path):
    size = streaming.write_shards(tmp_path / "train", images=7, shards=3)
    files = sorted((tmp_path / "train").iterdir())
    assert size == sum(file.stat().st_size for file in files)
    names = []
    for file in files:
        with tarfile.open(file) as tar:
            names += tar.getnames()
    assert len(files) == 3
    assert sorted(names) == sorted(f"{k:08}.{suffix}" for k in range(7) for suffix in ("jpg", "cls"))


def test_memory_is_that_of_a_process_and_its_children(monkeypatch):
    monkeypatch.setattr(streaming, "_INTERVAL_SECONDS", 0.02)
    child = "import time; held = b'x' * 2**26; time.sleep(1)"
    parent = f"import subprocess, sys; held = b'x' * 2**26; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        readings = streaming.watch(process)
    assert process.returncode == 0
    assert max(reading.mib for reading in readings) > 120
    assert [reading.seconds for reading in readings] == sorted(reading.seconds for reading in readings)


@pytest.mark.parametrize("number", [1, 2, 7, 40])
def test_a_summary_needs_no_number_of_readings(number):
    readings = [streaming.Reading(float(k), float(k)) for k in range(number)]
    found = streaming.summarize(readings)
    assert found["peak"] == number - 1
    assert found["first_quarter"] <= found["last_quarter"] <= found["peak"]


def test_readings_are_drawn(tmp_path):
    streaming.draw_readings([streaming.Reading(0, 1), streaming.Reading(1, 2)], tmp_path / "memory.png", "title")
    assert imread(tmp_path / "memory.png").shape[:2] == (300, 700)


@pytest.mark.slow
def test_memory_of_a_training_over_a_stream(tmp_path, capfd):
    plot = tmp_path / "memory.png"
    assert training.main(["memory", "--images", "64", "--shards", "2", "--workers", "0", "--plot", str(plot)]) == 0
    row = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (row["images"], row["epochs"]) == (64, 1)
    assert row["peak_mib"] >= row["last_quarter_mib"] > 50
    assert plot.stat().st_size > 1000


def test_a_training_that_fails_is_an_error(monkeypatch, capfd):
    monkeypatch.setattr(streaming, "write_shards", lambda folder, images, shards: 1)
    args = argparse.Namespace(images=1, shards=1, epochs=1, workers=0, buffer=1, plot=None)
    with pytest.raises(BadState, match=r"the training failed \(exit status 2\)"):
        streaming.measure_memory(args)
    assert "error: " in capfd.readouterr().err  # what the training said
