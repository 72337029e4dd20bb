"""Trainings on several labels, as users start them: on real digits, from files to a card and predictions."""

import csv
import json
import sys

import pytest
import torch
from sklearn.metrics import average_precision_score

import dg_timm
from dg_timm.cli import prediction
from dg_timm.cli import train as script
from dg_timm.hub.labeling import Labeling, labeling_of
from dg_timm.training.data.sources import load_splits
from dg_timm.training.run import networks
from tests.helpers.files import png
from tests.helpers.labels import NAMES, classes_of, flags, joined, labeled_csv
from tests.helpers.scripts import rows, run
from tests.helpers.training import train

SMALL = (
    "--model", "dg_test_convnext2", "--opt", "adamw", "--lr", "1e-3", "--image-size", "32", "--hflip", "0",
    "--batch-size", "32", "--workers", "0", "--log-every", "1",
)  # fmt: skip
SEVERAL = (*SMALL, "--task", "multilabel")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run, and its data."""
    folder = tmp_path_factory.mktemp("several")
    data = labeled_csv(folder / "data", range(120), joined)
    process = train(*SEVERAL, "--data", data, "--epochs", 2, "--output", folder / "run")
    assert process.returncode == 0, process.stderr
    assert "images of the training split" in process.stdout
    assert "are of no class" in process.stdout
    return folder / "run", data


def test_the_network_remembers_its_task(trained):
    output, _ = trained
    model = networks.create(str(output / "model"))
    assert labeling_of(model) == Labeling("multilabel", "bce")
    config = json.loads((output / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["problem_type"] == "multi_label_classification"  # transformers' pipeline takes the sigmoid
    assert config["label_names"] == sorted(NAMES)
    best = max(float(row["eval_map"]) for row in rows(output / "summary.csv"))
    card = (output / "model" / "README.md").read_text(encoding="utf-8")
    assert f"{best:.2f} |" in card
    assert "mAP (%)" in card
    assert "top-1" not in card
    assert "sigmoid()" in card


def test_saved_again_it_still_does(trained, tmp_path):
    output, _ = trained
    model = networks.create(str(output / "model"))
    dg_timm.save_pretrained(model, tmp_path / "again")
    assert labeling_of(networks.create(str(tmp_path / "again"))).task == "multilabel"
    other = networks.create(str(output / "model"), num_classes=7)
    assert labeling_of(other).task == "single"  # its classifier is another one
    weights = networks.create("dg_test_convnext2", initial_checkpoint=str(output / "model"))
    assert labeling_of(weights).task == "multilabel"


def held(k):
    """Columns of 0 and 1 of rows that are all to be evaluated on."""
    return {"split": "validation", **flags(k)}


def predict(capsys, *args):
    assert prediction.main([*map(str, args), "--json", "--workers", "0"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_validation_and_prediction_take_the_sigmoid(trained, capsys, tmp_path):
    output, _ = trained
    pictures = []
    for k in range(1000, 1040):
        pictures.append(tmp_path / f"{k}.png")
        pictures[-1].write_bytes(png(k))
    found = predict(capsys, output / "model", *pictures, "--top-k", 3)
    scores = torch.tensor([dict(zip(row["labels"], row["scores"], strict=True))[n] for row in found for n in NAMES])
    labels = torch.tensor([name in classes_of(k) for k in range(1000, 1040) for name in NAMES])
    likely = predict(capsys, output / "model", *pictures)
    assert [row["labels"] for row in likely] == [
        [name for name, score in zip(row["labels"], row["scores"], strict=True) if score >= 0.5] for row in found
    ]
    held_out = labeled_csv(tmp_path / "held", range(1000, 1040), held)
    process = run("validate.py", output / "model", "--data", held_out, "--workers", 0)
    assert process.returncode == 0, process.stderr
    line = json.loads(process.stdout.splitlines()[0])
    expected = average_precision_score(labels.view(-1, 3).numpy(), scores.view(-1, 3).numpy(), average="macro")
    assert line["map"] == pytest.approx(100 * expected, abs=0.01)
    assert line["map_classes"] == 3
    assert "top1" not in line


def test_predictions_of_several_labels_are_labels_again(trained, tmp_path):
    """What predict writes as CSV, train.py reads."""
    output, data = trained
    pictures = sorted(data.parent.glob("*.png"))[:20]
    file = tmp_path / "found.csv"
    assert prediction.main([str(output / "model"), *map(str, pictures), "--output", str(file), "--workers", "0"]) == 0
    with file.open(encoding="utf-8", newline="") as stream:
        found = list(csv.DictReader(stream))
    assert all(len(row["labels"].split("|")) == len(row["scores"].split("|")) for row in found)
    splits = load_splits(str(file), labeling=Labeling("multilabel", "bce"))
    assert set(splits.label_names) <= set(NAMES)
    assert splits.train.size + splits.test.size == 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--loss", "ce"), "--loss ce is not for --task multilabel, which has bce, asl, poly, zlpr"),
        (("--loss", "zlpr", "--mixup", "0.2"), "--loss zlpr takes labels of 0 and 1 alone"),
        (("--task", "single"), "has no label column; name one with --label-key"),
    ],
)
def test_what_does_not_go_together_is_one_line(trained, tmp_path, capsys, monkeypatch, args, message):
    _, data = trained
    words = ("train.py", *SEVERAL, "--data", data, *args, "--output", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    assert script.main() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_cost_is_learned_too(tmp_path):
    data = labeled_csv(tmp_path / "data", range(80), flags)
    options = ("--task", "multilabel", "--data", data, "--mixup", 0.2, "--smoothing", 0.1, "--epochs", 1)
    options = (*SMALL, *options, "--target-cost", 0.7, 0.9, "--output", tmp_path / "run")
    process = train(*options)
    assert process.returncode == 0, process.stderr
    row = rows(tmp_path / "run" / "summary.csv")[0]
    values = [
        float(row[f"eval_map{end}"]) - 100 * max(0.0, float(row[f"eval_cost{end}"]) - target)
        for end, target in (("", 0.9), ("@0.7", 0.7))
    ]
    assert float(row["eval_value"]) == pytest.approx(sum(values) / 2)
    model = networks.create(str(tmp_path / "run" / "model"))
    assert [point.top1 for point in dg_timm.budget_curve(model)] == [None] * 6


@pytest.mark.slow
def test_several_processes_evaluate_as_one(trained, tmp_path):
    output, _ = trained
    held_out = labeled_csv(tmp_path / "held", range(1000, 1043), held)
    lines = []
    for processes in (1, 2):
        process = run("validate.py", output / "model", "--data", held_out, "--workers", 0, "--batch-size", 5,
                      processes=processes)  # fmt: skip
        assert process.returncode == 0, process.stderr
        lines.append(json.loads(process.stdout.splitlines()[0]))
        lines[-1].pop("seconds")
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["asl", "poly", "zlpr"])
def test_every_loss_learns(tmp_path, loss):
    data = labeled_csv(tmp_path / "data", range(400), joined)
    process = train(*SEVERAL, "--data", data, "--loss", loss, "--epochs", 8, "--output", tmp_path / "run", "--lr", 3e-3)
    assert process.returncode == 0, process.stderr
    summary = rows(tmp_path / "run" / "summary.csv")
    assert float(summary[-1]["train_loss"]) < 0.95 * float(summary[0]["train_loss"])
    assert float(summary[-1]["eval_map"]) > 60  # a constant score has 50 at most
