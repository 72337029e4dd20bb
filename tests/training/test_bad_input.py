"""Bad input ends a script with one line, before anything is written."""

import argparse
import sys

import pytest
import timm

import dg_timm
from dg_timm._errors import BadState, BadValue, MissingPackage
from dg_timm.cli import calibration as calibrate
from dg_timm.cli import train as script
from dg_timm.cli import validate
from dg_timm.cli.errors import cli_errors
from dg_timm.training.loop.config import Interrupted, NonFiniteLoss
from dg_timm.training.run import fine_tuning
from dg_timm.training.run.lifecycle import RUN_FILES, check_unused, run_command
from tests.helpers.files import shards
from tests.helpers.scripts import run
from tests.helpers.training import TINY, train


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "dg_resnett50"), "dg_resnett50 is not a timm or dg_timm model; do you mean"),
        (("--data", "./nowhere"), "no such folder: ./nowhere; give a folder"),
        (("--label-key", "kind"), "--label-key kind: digits has no such column; its columns are image"),
        (("--num-classes", "4"), "--num-classes 4 is fewer than the 10 classes of digits"),
        (("--batch-size", "2000"), "--batch-size 2000 is more than the 1437 images"),
        (("--batch-size", "0"), "argument --batch-size: 0 is less than 1"),
        (("--batch-size", "30", "--micro-batch", "4"), "--micro-batch 4 does not divide the 30 images"),
        (("--batch-size", "3", "--mixup", "0.2"), "the micro-batch must be even, not 3"),
        (("--opt", "adamww"), "--opt adamww"),
        (("--lr", "fast"), "argument --lr: 'fast' is not a number"),
        (("--epochs", "1.5"), "argument --epochs: '1.5' is not an integer"),
        (("--label-names", "nowhere.txt"), "--label-names nowhere.txt can't be read"),
        (("--output", "/dev/null/run"), "/dev/null is a file, not a folder"),
        (("--lr", "nan"), "argument --lr: nan is not a finite number"),
        (("--smoothing", "1.5"), "1.5 is not between 0 and 1"),
        (("--model-kwargs", "edge_scale"), "--model-kwargs takes key=value, got 'edge_scale'"),
        (("--model-kwargs", "edgescale=1"), "edgescale"),
        (("--mixed-precision", "fp16"), "--mixed-precision fp16 needs a GPU"),
        (("--sync-bn",), "--sync-bn needs GPUs"),
        (("--distill",), "has no trained classifier"),
        (("--report-to", "wandbb"), "--report-to wandbb: there are"),
        (("--recipe", "nowhere"), "--recipe nowhere: no such file or recipe; there are cifar10"),
        (("--initial-checkpoint", "x.safetensors"), "checkpoint x.safetensors: there is no x.safetensors"),
        (("--resume", "nowhere"), "--resume nowhere is no sound checkpoint: there is no such folder"),
        (("--auto-augment", "nonsense"), "timm can't make this augmentation (--auto-augment nonsense)"),
        (("--mean", "0.5", "0.5"), "--mean has 2 values for 3 channels"),
        (("--label-key", "image"), "column image of digits is Image"),
        (("--opt-kwargs", "betas=[0.9"), "'betas=[0.9' has no valid value"),
        (("--distill-temperature", "0"), "0 is not above 0"),
        (("--reci", "digits"), "unrecognized arguments: --reci"),
        (("--freeze", "all-but-graph", "--model", "test_resnet"), "it is static"),
        (("--warmup-epochs", "10"), "--warmup-epochs 10 leaves nothing of --epochs 10"),
        (("--in-chans", "2"), "--in-chans"),
    ],
)
def test_bad_input_ends_before_anything_is_written(tmp_path, capsys, args, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "digits", "--model", "dg_test_resnet", "--workers", "0",
                                      "--output", str(tmp_path / "out"), *args])  # fmt: skip
    try:
        code = script.main()
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def namespace(**options):
    return argparse.Namespace(mixed_precision="no", report_to=[], output=None, **options)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BadValue("--lr is wrong"), 2, "error: --lr is wrong\n"),
        (BadState("the disk is full"), 2, "error: the disk is full\n"),
        (MissingPackage("no matplotlib"), 2, "error: no matplotlib\n"),
        (NonFiniteLoss("the loss became nan"), 1, "error: the loss became nan. A smaller --lr"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, code, message):
    def work(accelerator, interrupt):
        raise error

    assert cli_errors(run_command)(namespace(), work) == code
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, RuntimeError, KeyError])
def test_a_defect_keeps_its_traceback(error):
    def work(accelerator, interrupt):
        raise error("a defect")

    with pytest.raises(error, match="a defect"):
        run_command(namespace(), work)


def test_an_interrupted_script_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def work(accelerator, interrupt):
        raise Interrupted(15, tmp_path / "update-00000001")

    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "1"])
    assert cli_errors(run_command)(namespace(), work) == 128 + 15
    assert "Go on with:\n  python train.py --seed 1 --resume auto" in capsys.readouterr().out


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_folder_in_use_is_refused(tmp_path, name):
    check_unused(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(BadState, match=f"holds a run already .{name}.: give another --output"):
        check_unused(tmp_path)
    check_unused(tmp_path, files=())


def test_bad_models_are_one_line_of_validate_and_calibrate(capsys, monkeypatch):
    for own, name in ((validate, "validate.py"), (calibrate, "calibrate.py")):
        for words, message in (
            (["dg_resnett50"], "is not a timm or dg_timm model"),
            (["./none"], "there is no folder ./none"),
        ):
            monkeypatch.setattr(sys, "argv", [name, *words, "--data", "digits", "--workers", "0"])
            assert own.main() == 2
            assert message in capsys.readouterr().err


def test_a_static_network_has_no_threshold_to_calibrate(capsys, monkeypatch, tmp_path):
    model = timm.create_model("test_resnet", num_classes=10)
    fine_tuning.save_model(model, tmp_path, dg_timm.Card(), label_names=None, data_config={})
    monkeypatch.setattr(sys, "argv", ["calibrate.py", str(tmp_path), "--data", "digits"])
    assert calibrate.main() == 2
    assert "is static: it has no threshold to choose" in capsys.readouterr().err


def test_more_classes_than_the_head(tmp_path, finished):
    output, _ = finished
    process = run("validate.py", output / "model", "--data", shards(tmp_path / "w"), "--val-data", tmp_path / "w",
                  "--streaming", "--num-classes", 12)  # fmt: skip
    assert process.returncode == 2
    assert "has 10 classes" in process.stderr
    assert "12" in process.stderr


@pytest.mark.parametrize(
    ("options", "error"),
    [(("--model", "test_resnet", "--target-cost", 0.5), "is a static network"),
     (("--model", "dg_test_resnet", "--target-cost", 0.01), "can't be reached: dg_test_resnet costs 0."),
     (("--model", "dg_test_resnet", "--target-cost", 1.0, 0.9), "the lowest and the highest of a range, got 1 0.9")],
)  # fmt: skip
def test_costs_that_can_not_be_aimed_at(options, error, tmp_path):
    process = train(*TINY, *options, "--train-limit", 64, "--output", tmp_path / "run")
    assert process.returncode == 2
    assert error in process.stderr
    assert not (tmp_path / "run").exists()
