"""A dry run says what a run would do, and leaves nothing behind: no file, and no setting of the process."""

import sys
import warnings

import datasets
import pytest

from dg_timm._errors import BadValue
from dg_timm.cli import train as script
from dg_timm.training.loop.distributed import make_accelerator
from dg_timm.training.run.preview import dry_run
from tests.helpers.files import image_folder, shards

TINY = ["--data", "digits", "--model", "dg_test_resnet", "--image-size", "32", "--batch-size", "8", "--workers", "0"]


def look(*words):
    dry_run(script.parse([*TINY, *map(str, words)]), make_accelerator())


def test_the_cache_of_datasets_stays_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    look("--data", image_folder(tmp_path / "images", 10))
    assert "16 images to train on, 2 classes" in capsys.readouterr().out
    assert tmp_path / "cache" == datasets.config.HF_DATASETS_CACHE
    assert not (tmp_path / "cache").exists()  # it was copied elsewhere, and that is gone


def test_data_whose_size_is_given_are_not_opened(capsys):
    look("--data", "/nowhere", "--epoch-size", 640, "--num-classes", 3)
    out = capsys.readouterr().out
    assert "/nowhere (not opened: its size is given): 640 images to train on, 3 classes" in out
    assert "80 updates an epoch, 800 in 10 epochs" in out


def test_a_stream_is_counted(tmp_path, capsys):
    folder = shards(tmp_path / "s", count=2, rows=10)
    look("--data", folder, "--val-data", "digits", "--streaming", "--num-classes", 10)
    assert "20 images to train on, 10 classes" in capsys.readouterr().out


def test_the_plan_shows_groups_and_rates(capsys):
    look("--data", "digits", "--epochs", 8, "--lr", 0.5, "--graph-lr-scale", 0.25, "--freeze", "none")
    out = capsys.readouterr().out
    assert any(line.split()[0] == "graph" and "lr x 0.25" in line for line in out.splitlines() if line.strip())
    rates = {line.split()[1]: float(line.split()[2]) for line in out.splitlines() if line.startswith("  epoch")}
    assert rates["0"] == 0.5
    assert rates["4"] == pytest.approx(0.25, rel=0.05)  # half of a cosine
    assert rates["8"] == pytest.approx(0.0, abs=1e-3)


def test_more_images_in_an_update_than_there_are(tmp_path):
    folder = image_folder(tmp_path / "images", 10)
    with pytest.raises(BadValue, match="--batch-size 64 is more than the 16 images of"):
        look("--data", folder, "--batch-size", 64)


def test_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--dry-run", "--output", "run"])
    assert script.main() == 0
    assert not list(tmp_path.iterdir())


def test_accelerate_changes_no_filter_of_warnings():
    before = list(warnings.filters)
    make_accelerator()
    assert list(warnings.filters) == before
