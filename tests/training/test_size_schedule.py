"""Image sizes that change over a training: which epoch has which, and that a resume changes nothing."""

import itertools
import sys

import pytest

from dg_timm._errors import BadValue
from dg_timm.cli import train as script
from dg_timm.training.data.size_schedule import SizeSchedule
from dg_timm.training.loop.distributed import make_accelerator
from dg_timm.training.loop.optimization import split_batch
from dg_timm.training.run.classification import build_classification
from tests.helpers.scripts import rows
from tests.helpers.training import PLAIN

SHORT = (*PLAIN, "--train-limit", 96, "--val-limit", 40)


@pytest.mark.parametrize(
    ("sizes", "epochs", "expected"),
    [
        ([16, 32], 4, [16, 16, 32, 32]),
        ([16, 24, 32], 4, [16, 16, 24, 32]),
        ([32, 16, 8], 3, [32, 16, 8]),
        ([16, 32], 3, [16, 16, 32]),
        ([24], 2, [24, 24]),
    ],
)
def test_epochs_are_divided_among_the_sizes(sizes, epochs, expected):
    schedule = SizeSchedule(sizes, epochs, lambda size: lambda image: size)
    assert [schedule.at(epoch)(None) for epoch in range(epochs)] == expected
    assert schedule.at(epochs + 5)(None) == expected[-1]  # of a schedule of rates with a cool-down
    assert schedule.describe().count("from epoch") == len(sizes)


def test_an_epoch_has_one_size():
    with pytest.raises(BadValue, match="--size-schedule has 3 sizes for 2 epochs; an epoch has one size"):
        SizeSchedule([8, 16, 32], 2, lambda size: lambda image: size)


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    return script.main()


@pytest.mark.parametrize("augment", ["--augment", "--no-augment"])
@pytest.mark.parametrize("length", [("--epochs", 4), ("--updates", 10)])
def test_training_images_have_the_sizes_and_others_do_not(monkeypatch, tmp_path, capsys, augment, length):
    words = (*SHORT, *length, "--image-size", 40, "--size-schedule", 32, 48, augment, "--output", tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    args = script.parse()
    task = build_classification(args, make_accelerator(mixed_precision="no"), split_batch(32, 1, None))
    sizes = [tuple(next(task.loader.epoch(epoch)).images.shape[1:]) for epoch in range(4)]
    assert sizes == [(3, 32, 32), (3, 32, 32), (3, 48, 48), (3, 48, 48)]
    assert {tuple(batch.images.shape[1:]) for batch in task.val_loader.epoch(0)} == {(3, 40, 40)}
    assert "training images by 32 from epoch 1, 48 from epoch 3, in pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--size-schedule", "32", "48", "--epochs", "1"), "--size-schedule has 2 sizes for 1 epochs"),
        (("--size-schedule", "0"), "argument --size-schedule: 0 is less than 1"),
        (("--size-schedule", "16", "32"), "dg_test_convnext2 can't take images of 16 pixels (Calculated padded"),
        (("--model", "vit_tiny_patch16_224", "--size-schedule", "32"), "can't take images of 32 pixels (Input height"),
    ],
)
def test_bad_sizes_are_one_line(monkeypatch, tmp_path, capsys, args, message):
    try:
        code = main(monkeypatch, *SHORT, "--output", tmp_path / "run", *args)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_ends_bit_for_bit_as_another(monkeypatch, tmp_path):
    """Resumed in the midst of the last epoch of the small size, so that the larger one is still to come."""
    words = (*SHORT, "--epochs", 4, "--size-schedule", 32, 64, "--mixup", 0.2, "--target-cost", 0.8, "--save-every", 1)
    words = (*words, "--keep", 20, "--output", tmp_path / "run")
    assert main(monkeypatch, *words) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    last = sorted(checkpoints.glob("update-*"))[-1].name
    files = [checkpoints / last / "model.safetensors", tmp_path / "run" / "updates.csv"]
    before = files[0].read_bytes(), [(row["update"], row["loss"]) for row in rows(files[1])]
    assert main(monkeypatch, *words, "--resume", checkpoints / "update-00000005") == 0
    assert (files[0].read_bytes(), [(row["update"], row["loss"]) for row in rows(files[1])]) == before
    assert any(itertools.chain(checkpoints.glob("aside-*")))  # it was another training, not a look at the first
    summary = rows(tmp_path / "run" / "summary.csv")
    assert [row["epoch"] for row in summary] == ["1", "2", "3", "4"]
    assert float(summary[-1]["eval_cost"]) < 1
