"""The quickstart as a user runs it: another process, real digits, one epoch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

SCRIPT = Path(__file__).parents[2] / "train_scripts" / "quickstart.py"


def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=500, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart")
    return output, run("--epochs", 1, "--output", output)


def test_it_prints_the_comparison_and_saves(finished):
    output, process = finished
    assert process.returncode == 0, process.stderr
    for row in ("parameters (M)", "multiply-adds (M)", "test accuracy (%)", "training (s)", "inference (ms/image)"):
        assert row in process.stdout
    assert "predicts the same" in process.stdout
    assert "100%" in process.stderr  # the progress bar
    assert (output / "wiring.png").stat().st_size > 10_000
    model = timm.create_model(f"local-dir:{output / 'model'}", pretrained=True)
    assert model.num_classes == 10
    assert "digits" in (output / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "resnet18"), "--model resnet18 is not in the zoo; choose from dg_"),
        (("--epochs", "0"), "--epochs must be positive, got 0"),
        (("--image-size", "-3"), "--image-size must be positive, got -3"),
        (("--data", "./nowhere"), "./nowhere is not there"),
    ],
)
def test_bad_arguments_end_before_any_work(args, message, tmp_path):
    process = run(*args, "--output", tmp_path / "out")
    assert process.returncode != 0
    assert message in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT)]
    command += ["--epochs", "1", "--output", str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("parameters (M)") == 1
    assert "11/11" in process.stderr  # half the steps of one process
