"""Soft labels: a share or a score of every class, on real digits, against closed forms."""

import json

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from dg_timm._errors import BadValue
from dg_timm.hub.labeling import Labeling, labeling_of
from dg_timm.training.data.images import Batch, Collate, Images
from dg_timm.training.data.loader import Loader
from dg_timm.training.data.samplers import MapSampler
from dg_timm.training.data.seeding import seeded
from dg_timm.training.data.sources import load_splits
from dg_timm.training.loop.distributed import make_accelerator
from dg_timm.training.loop.evaluation import evaluate_model
from dg_timm.training.loop.figures import figures_of
from dg_timm.training.loop.objective import ClassificationObjective
from dg_timm.training.run import networks
from tests.helpers.files import png
from tests.helpers.labels import NAMES, labeled_csv, shares_of
from tests.helpers.scripts import rows, run
from tests.helpers.training import train

SHARES, SCORES = Labeling("soft", "ce"), Labeling("soft", "bce")
SMALL = (
    "--model", "dg_test_convnext2", "--opt", "adamw", "--lr", "1e-3", "--image-size", "32", "--hflip", "0",
    "--batch-size", "16", "--workers", "0",
)  # fmt: skip


def columns(k):
    """A column for each class, rounded to two digits as people write them."""
    return {name: f"{share:.2f}" for name, share in zip(NAMES, shares_of(k), strict=True)}


def saved(folder, value, count=12):
    """A data set saved to disk, with a list of floats for each row."""
    features = datasets.Features(image=datasets.Image(), labels=datasets.List(datasets.Value("float32")))
    table = {
        "image": [{"bytes": png(k), "path": None} for k in range(count)],
        "labels": [value(k) for k in range(count)],
    }
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("source", ["columns", "lists"])
def test_labels_are_the_shares(tmp_path, source):
    data = saved(tmp_path, shares_of) if source == "lists" else labeled_csv(tmp_path, range(12), columns)
    splits = load_splits(str(data), labeling=SHARES)
    assert splits.label_names == (["0", "1", "2"] if source == "lists" else list(NAMES))
    images = Images(splits.train, lambda image: torch.zeros(3, 8, 8), splits.label_names)
    size = splits.train.size
    (batch,) = Loader(MapSampler(size, size), images, Collate(size, (3, 8, 8), 3)).epoch(0)
    expected = torch.tensor([shares_of(splits.train.source_row(k)) for k in range(size)])
    assert torch.allclose(batch.labels, expected, atol=0.0051)


@pytest.mark.parametrize(
    ("value", "labeling", "message"),
    [
        ([0.5, 0.7, -0.2], SHARES, "row 0 of .* says -0.2.* of class '2', and not a number from 0 to 1"),
        ([0.5, float("nan"), 0.5], SHARES, "says nan of class '1'"),
        ([0.5, float("inf"), 0.5], SCORES, "says inf of class '1'"),
        ([0.5, 0.5, 0.5], SHARES, r"has shares that add up to 1.5, not to 1 \(scores are for --loss bce\)"),
        ([0.5, 0.5], SHARES, "row 1 of .* has 3 numbers for 2 classes"),
    ],
)
def test_bad_shares_are_one_line(tmp_path, value, labeling, message):
    data = saved(tmp_path, lambda k: shares_of(k) if k else value)
    with pytest.raises(BadValue, match=message):
        load_splits(str(data), labeling=labeling)


def test_names_and_texts_are_no_shares(tmp_path):
    with pytest.raises(BadValue, match="soft labels are a list of numbers, or a column a class"):
        load_splits(str(labeled_csv(tmp_path, range(4), lambda k: {"labels": "a|b"})), labeling=SHARES)
    data = labeled_csv(tmp_path, range(4), lambda k: columns(k) | ({"even": "half"} if k == 2 else {}), "b.csv")
    with pytest.raises(BadValue, match=r"row 2 of .*b.csv \(.*2.png\) says 'half' of class 'even'"):
        load_splits(str(data), labeling=SHARES)


TARGET = torch.tensor([shares_of(k) for k in range(6)])


def batch():
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return Batch(images, TARGET, torch.ones(6), torch.zeros(6, 2, dtype=torch.long), [], [])


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))


@pytest.mark.parametrize(
    ("labeling", "timms"), [(SHARES, SoftTargetCrossEntropy()), (SCORES, BinaryCrossEntropy(smoothing=0.0))]
)
@pytest.mark.parametrize("mixes", [False, True])
def test_losses_are_timms(labeling, timms, mixes):
    model, own = network(), batch()
    mixup = Mixup(0.8, 0.0, label_smoothing=0.0, num_classes=3, multi_label=True) if mixes else None
    objective = ClassificationObjective(3, smoothing=0.1, labeling=labeling, mixup=mixup, seed=3)
    found = objective(model, own._replace(images=own.images.clone()), 7, 0, 0)
    images, target = own.images, TARGET * 0.9 + 0.1 / 3
    if mixup is not None:
        with seeded(3, 7, 0, 0):
            images, target = mixup(own.images.clone(), target)
    assert found.loss.shape == (6,)
    assert found.loss.mean().item() == pytest.approx(timms(model(images), target).item(), rel=1e-5)
    right = model(images).argmax(1) == target.argmax(1)
    assert found.metrics["top1"].tolist() == (100.0 * right).tolist()


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 3)

    def forward(self, images):
        return self.layer(images[:, 0].flatten(1))


@pytest.mark.parametrize("labeling", [SHARES, SCORES])
def test_figures_are_those_of_all_images_at_once(tmp_path, labeling):
    splits = load_splits(str(labeled_csv(tmp_path, range(40), columns)), labeling=labeling)
    to_tensor = lambda image: torch.tensor(np.asarray(image.convert("L"))).view(1, 8, 8) / 255  # noqa: E731
    images, model, size = Images(splits.train, to_tensor, NAMES), Linear(), splits.train.size
    loader = Loader(MapSampler(size, 7), images, Collate(7, (1, 8, 8), 3))
    found = evaluate_model(model, loader.epoch(0), make_accelerator(), figures=figures_of(labeling, 3))
    (whole,) = Loader(MapSampler(size, size), images, Collate(size, (1, 8, 8), 3)).epoch(0)
    with torch.no_grad():
        logits = model(whole.images)
    cross, binary = F.cross_entropy(logits, whole.labels), F.binary_cross_entropy_with_logits(logits, whole.labels)
    assert found.loss == pytest.approx((binary if labeling.independent else cross).item(), rel=1e-6)
    right = logits.argmax(1) == whole.labels.argmax(1)
    assert found.top1 == pytest.approx(100 * right.float().mean().item())


def test_a_run_remembers_its_task(tmp_path):
    data = labeled_csv(tmp_path / "data", range(60), columns)
    process = train(*SMALL, "--task", "soft", "--data", data, "--epochs", 1, "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    row = rows(tmp_path / "run" / "summary.csv")[0]
    assert labeling_of(networks.create(str(tmp_path / "run" / "model"))) == SHARES
    process = run("validate.py", tmp_path / "run" / "model", "--data", data, "--workers", 0)
    assert process.returncode == 0, process.stderr
    line = json.loads(process.stdout.splitlines()[0])
    assert (line["loss"], line["top1"]) == (float(row["eval_loss"]), float(row["eval_top1"]))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_shares_are_learned(tmp_path, loss):
    data = labeled_csv(tmp_path / "data", range(600), columns)
    options = ("--task", "soft", "--loss", loss, "--data", data, "--epochs", 12, "--output", tmp_path / "run")
    process = train(*SMALL, *options, "--lr", 3e-3)
    assert process.returncode == 0, process.stderr
    summary = rows(tmp_path / "run" / "summary.csv")
    assert float(summary[-1]["eval_loss"]) < 0.97 * float(summary[0]["eval_loss"])
    assert float(summary[-1]["eval_top1"]) > float(summary[0]["eval_top1"])
