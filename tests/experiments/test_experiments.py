"""Experiments end to end on scikit-learn's digits: trainings happen once, a rerun gives the same table."""

import signal
import subprocess
import time

import pytest

from tests.helpers.scripts import command, one_thread, rows, run

TINY = ["--set", "epochs=1", "warmup-epochs=0", "train-limit=64", "val-limit=64", "batch-size=32", "image-size=16"]


def test_an_option_that_train_does_not_have_is_named_without_a_traceback(tmp_path):
    places = ("--output", tmp_path / "o", "--results", tmp_path / "r")
    done = run(
        "experiments/ablation.py", "--data", "digits", *places, "--only", "static", "--seeds", 0, "--set", "epochz=1"
    )
    assert done.returncode == 2
    assert "unrecognized arguments" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_sigterm_reaches_the_trainings_and_the_same_command_goes_on(tmp_path):
    places = ("--output", tmp_path / "o", "--results", tmp_path / "r")
    many = ["--set", "epochs=40", "warmup-epochs=0", "train-limit=256", "val-limit=64", "batch-size=32",
            "image-size=16"]  # fmt: skip
    words = command("experiments/ablation.py", "--data", "digits", *places, "--only", "static", "--seeds", 0, *many)
    with (tmp_path / "said").open("w", encoding="utf-8") as said:
        first = subprocess.Popen(words, stderr=said, env=one_thread())
    log = tmp_path / "o" / "static-0" / "log.txt"
    while not (log.exists() and "epoch 2" in log.read_text(encoding="utf-8")):
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 128 + signal.SIGTERM
    assert "the same command goes on" in (tmp_path / "said").read_text(encoding="utf-8")
    assert "stopped by signal 15; saved" in log.read_text(encoding="utf-8")
    assert not (tmp_path / "r").exists()
    assert subprocess.run(words, check=False, env=one_thread()).returncode == 0
    assert (tmp_path / "r" / "static-0.json").exists()


@pytest.mark.slow
def test_an_experiment_runs_and_a_rerun_of_a_trial_gives_its_csv(tmp_path):
    words = ("experiments/ablation.py", "--data", "digits", "--only", "static", "alpha", "ws", "--seeds", 0, 1, *TINY)
    first = run(*words, "--output", tmp_path / "a", "--results", tmp_path / "ra")
    assert first.returncode == 0, first.stdout + first.stderr
    assert (tmp_path / "ra" / "ablation.png").stat().st_size > 1000
    table = (tmp_path / "ra" / "ablation.csv").read_bytes()
    assert len(rows(tmp_path / "ra" / "ablation.csv")) == 6
    (tmp_path / "ra" / "alpha-1.json").unlink()
    again = run(*words, "--output", tmp_path / "b", "--results", tmp_path / "ra")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("begins") == 1
    assert (tmp_path / "ra" / "ablation.csv").read_bytes() == table


@pytest.mark.slow
def test_the_curve_of_budgets_and_the_paths_of_images(tmp_path):
    places = ("--output", tmp_path / "out", "--results", tmp_path / "kept")
    done = run("experiments/budgets.py", "--data", "digits", "--only", "dg_cifar_resnet26", "cifar_resnet26", "skip",
               "cifar_resnet14", "--target-cost", 0.5, "--points", 3, "--rounds", 2, *places, *TINY)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(tmp_path / "kept" / "budgets.csv")
    assert [row["network"] for row in table].count("dg_cifar_resnet26-0.5") == 4
    assert [row["network"] for row in table].count("skip") == 4
    costs = {row["network"]: float(row["cost"]) for row in table}
    assert costs["cifar_resnet26"] == 1.0
    assert costs["cifar_resnet14"] == pytest.approx(0.485, abs=0.01)
    assert not any("time" in key for key in table[0])
    looked = run("experiments/paths.py", "--data", "digits", "--static", tmp_path / "out" / "cifar_resnet26-0",
                 "--model", tmp_path / "out/dg_cifar_resnet26-0.5-0/run/checkpoints/last",
                 "--results", tmp_path / "paths")  # fmt: skip
    assert looked.returncode == 0, looked.stdout + looked.stderr
    tenths = rows(tmp_path / "paths" / "difficulty.csv")
    assert sum(int(row["images"]) for row in tenths) == 360
    losses = [float(row["static_loss"]) for row in tenths]
    assert losses == sorted(losses)
    assert (tmp_path / "paths" / "wiring.png").stat().st_size > 1000
    shipped = run("experiments/ship.py", "--data", "digits", "--target-cost", 0.5, "--folder", tmp_path / "ship",
                  *places, *TINY)  # fmt: skip
    assert shipped.returncode == 2
    assert "the card is about CIFAR-10" in shipped.stderr
