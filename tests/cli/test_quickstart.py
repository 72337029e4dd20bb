"""The quickstart as a user runs it: another process, real digits, one epoch."""

import pytest
import timm

from dg_timm.cli import quickstart
from tests.helpers.scripts import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart")
    return output, run("quickstart.py", "--epochs", 1, "--output", output)


def test_it_prints_the_comparison(finished):
    _, process = finished
    assert process.returncode == 0, process.stderr
    for row in ("parameters (M)", "multiply-adds (M)", "test accuracy (%)", "training (s)", "inference (ms/image)"):
        assert row in process.stdout
    assert "predicts the same" in process.stdout
    assert "100%" in process.stderr  # the progress bar


def test_it_saves_a_network_that_loads_and_a_picture(finished):
    output, _ = finished
    assert (output / "wiring.png").stat().st_size > 10_000
    model = timm.create_model(f"local-dir:{output / 'model'}", pretrained=True)
    assert model.num_classes == 10
    card = (output / "model" / "README.md").read_text(encoding="utf-8")
    assert "digits" in card
    assert "`train_scripts/quickstart.py`" in card


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "resnet18"), "--model resnet18 is not in the zoo; choose from dg_"),
        (("--model", "dg_vit"), "--model dg_vit is not in the zoo; choose from dg_"),
        (("--epochs", "0"), "--epochs: 0 is less than 1"),
        (("--image-size", "-3"), "--image-size: -3 is less than 1"),
        (("--lr", "0"), "--lr: 0 is not above 0"),
        (("--hflip", "2"), "--hflip: 2 is not between 0 and 1"),
        (("--data", "./nowhere"), "no such folder: ./nowhere"),
    ],
)
def test_bad_arguments_end_before_any_work(args, message, tmp_path, capsys):
    try:
        status = quickstart.main([*args, "--output", str(tmp_path / "out")])
    except SystemExit as end:  # of argparse
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_digits_are_not_mirrored():
    assert quickstart.parse([]).hflip == 0.0
    assert quickstart.parse(["--data", "org/set"]).hflip == 0.5
    assert quickstart.parse(["--hflip", "0.2"]).hflip == 0.2


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path):
    process = run("quickstart.py", "--epochs", 1, "--output", tmp_path / "out", processes=2, timeout=500)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("parameters (M)") == 1
    assert "11/11" in process.stderr  # half the steps of one process
