"""Several labels a row: every form in which data sets write them, and their figures against written-out definitions."""

import datasets
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import create_classification_loss
from timm.task.distillation import DistillationTeacher

from dg_timm._errors import BadValue
from dg_timm.hub.labeling import LOSSES, Labeling
from dg_timm.training.data.images import Batch, Collate, Images
from dg_timm.training.data.loader import Loader
from dg_timm.training.data.samplers import MapSampler, StreamSampler
from dg_timm.training.data.seeding import seeded
from dg_timm.training.data.sources import load_splits
from dg_timm.training.loop.distributed import make_accelerator
from dg_timm.training.loop.evaluation import evaluate_model
from dg_timm.training.loop.figures import average_precision, figures_of, keep_scores
from dg_timm.training.loop.objective import ClassificationObjective
from dg_timm.training.run.classes import match_classes
from tests.helpers.files import png
from tests.helpers.labels import NAMES, classes_of, flags, joined, labeled_csv

ROWS = range(12)
SEVERAL = Labeling("multilabel", "bce")


def many_hot(k: int) -> list[float]:
    return [float(name in classes_of(k)) for name in NAMES]


def saved(folder, feature, value):
    """A data set saved to disk with a column ``labels`` of this type."""
    rows = {"image": [{"bytes": png(k), "path": None} for k in ROWS], "labels": [value(k) for k in ROWS]}
    features = datasets.Features(image=datasets.Image(), labels=feature)
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def parquet(folder):
    rows = {"image": [{"bytes": png(k), "path": None} for k in ROWS]}
    rows |= {name: [bool(many_hot(k)[n]) for k in ROWS] for n, name in enumerate(NAMES)}
    features = datasets.Features(image=datasets.Image(), **{name: datasets.Value("bool") for name in NAMES})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


NUMBERS = {name: k for k, name in enumerate(NAMES)}
FORMS = {
    "texts of a CSV": lambda folder: labeled_csv(folder, ROWS, joined),
    "columns of a CSV": lambda folder: labeled_csv(folder, ROWS, flags),
    "lists of JSON lines": lambda folder: (
        labeled_csv(folder, ROWS, lambda k: {"labels": classes_of(k) or None}, "metadata.jsonl").parent
    ),
    "lists of ClassLabel": lambda folder: saved(
        folder, datasets.List(datasets.ClassLabel(names=list(NAMES))), lambda k: [NUMBERS[n] for n in classes_of(k)]
    ),
    "lists of names": lambda folder: saved(folder, datasets.List(datasets.Value("string")), classes_of),
    "lists of 0 and 1": lambda folder: saved(folder, datasets.List(datasets.Value("int64")), many_hot),
    "columns of Parquet": parquet,
}


def targets(split, label_names):
    """The labels of all rows of a split, as a loader gives them: (rows, classes), in the order of the rows."""
    images = Images(split, lambda image: torch.zeros(3, 8, 8), label_names)
    order = StreamSampler(split.rows, 64) if split.streamed else MapSampler(split.size, 64)
    batches = list(Loader(order, images, Collate(64, (3, 8, 8), len(label_names))).epoch(0))
    found = torch.cat([batch.labels[batch.sample_mask > 0] for batch in batches])
    places = torch.cat([batch.rows[batch.sample_mask > 0] for batch in batches]).tolist()
    return found[sorted(range(len(places)), key=places.__getitem__)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_labels(tmp_path, form, streaming):
    source = str(FORMS[form](tmp_path))
    names = list(NAMES)
    given = names if "list" in form or "text" in form or form == "columns of Parquet" else None
    splits = load_splits(
        source, val_source=source, train_split="train", labeling=SEVERAL, streaming=streaming, label_names=given,
        only_evaluate=True,
    )  # fmt: skip
    assert splits.label_names == names
    found = targets(splits.test, names)
    assert found.dtype == torch.float32
    assert found.tolist() == [many_hot(k) for k in ROWS]


def test_names_are_found_and_some_rows_are_set_aside(tmp_path):
    splits = load_splits(str(labeled_csv(tmp_path, range(20), joined)), labeling=SEVERAL)
    assert splits.label_names == sorted(NAMES)
    assert (splits.train.size, splits.test.size) == (16, 4)
    rows = [split.source_row(k) for split in (splits.train, splits.test) for k in range(split.size)]
    assert sorted(rows) == list(range(20))


def test_labels_are_matched_by_name(tmp_path):
    """A network that knows the classes in another order gets them in its own."""
    splits = load_splits(str(labeled_csv(tmp_path, ROWS, flags)), labeling=SEVERAL)
    turned = targets(splits.train, NAMES[::-1])
    assert torch.equal(turned.flip(1), targets(splits.train, NAMES))


def test_lists_of_0_and_1_have_no_names(tmp_path):
    """They are those of a network's classes, by their places; with --label-names they are named, and may be turned."""
    source = saved(tmp_path, datasets.List(datasets.Value("int64")), many_hot)
    model = timm.create_model("test_resnet", num_classes=3)
    model.pretrained_cfg["label_names"] = list(NAMES[::-1])
    splits = load_splits(str(source), labeling=SEVERAL)
    assert match_classes("net", model, splits, "data", None) == ["0", "1", "2"]
    named = load_splits(str(source), labeling=SEVERAL, label_names=list(NAMES))
    names = match_classes("net", model, named, "data", None)
    assert names == list(NAMES[::-1])
    assert torch.equal(targets(named.test, names).flip(1), targets(splits.test, ["0", "1", "2"]))


def changed(row, **values):
    """The columns of 0 and 1, other in one row."""
    return lambda k: {**flags(k), **(values if k == row else {})}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (changed(3, even="yes"), {}, r"row 3 of .*a.csv \(.*3.png\) says 'yes' of class 'even', and not 0 or 1"),
        (changed(3, even=""), {}, "row 3 of .* says '' of class 'even', and not 0 or 1"),
        (changed(5, looped=2), {}, "row 5 of .* says 2.0 of class 'looped', and not 0 or 1"),
        (changed(5, looped=0.5), {}, "row 5 of .* says '0.5' of class 'looped'"),
        (flags, dict(label_key="even,odd"), "--label-key odd: .* has no such column; its columns are"),
        (flags, dict(label_key="even,even"), "--label-key even,even names a column twice"),
        (flags, dict(label_names=["a"]), "1 label names for the 3 classes of"),
        (
            joined,
            dict(label_names=["even", "small"]),
            r"has the label 'looped', which is no class of \['even', 'small'\]",
        ),
        (lambda k: {"labels": " ".join(classes_of(k))}, {}, "has the character '|' between labels, e.g. 'even looped"),
        (lambda k: {"labels": ""}, {}, "no row of .* has a label in column labels"),
        (lambda k: {"label": 3}, {}, "column label of .* is Value.*several labels are a list of names"),
        (lambda k: {}, {}, "has no column of labels; name it with --label-key"),
    ],
)
def test_bad_labels_are_one_line(tmp_path, columns, options, message):
    source = labeled_csv(tmp_path, ROWS, columns)
    with pytest.raises(BadValue, match=message) as error:
        load_splits(str(source), labeling=SEVERAL, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda k: ["1", "0", "1"], "has the texts '0' and '1' where numbers belong"),
        (lambda k: [0, 1, 1] if k else [1, 0], "row 1 of .* has 3 numbers for 2 classes"),
        (lambda k: [0, 1, k], "row 2 of .* says 2.* of class '2', and not 0 or 1"),
    ],
)
def test_bad_lists_are_one_line(tmp_path, value, message):
    kind = "string" if isinstance(value(0)[0], str) else "int64"
    with pytest.raises(BadValue, match=message):
        load_splits(str(saved(tmp_path, datasets.List(datasets.Value(kind)), value)), labeling=SEVERAL)


def test_bad_rows_are_left_out_if_asked(tmp_path):
    source = str(labeled_csv(tmp_path, ROWS, changed(3, even="yes")))
    splits = load_splits(source, labeling=SEVERAL, skip_bad_rows=True)
    assert splits.train.size + splits.test.size == len(ROWS) - 1
    assert any("1 rows of" in remark for remark in splits.left_out)


def test_one_label_is_refused_where_rows_have_several(tmp_path):
    source = saved(tmp_path, datasets.List(datasets.Value("string")), classes_of)
    with pytest.raises(BadValue, match="a row of several labels is for --task multilabel"):
        load_splits(str(source), label_key="labels")


def precision_by_hand(scores, labels):
    """Mean over the positives of the precision among all that score at least as much (no ties)."""
    found = [np.mean(labels[scores >= scores[k]]) for k in np.flatnonzero(labels)]
    return float(np.mean(found))


def test_figures_are_their_definitions():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 5)).astype(np.float32), (rng.random((40, 5)) < 0.3).astype(np.float32)
    labels[:, 2] = 0  # a class that no image has
    found = average_precision(keep_scores(torch.tensor(logits), torch.tensor(labels)))
    seen = [0, 1, 3, 4]
    assert found["map"] == pytest.approx(100 * np.mean([precision_by_hand(logits[:, k], labels[:, k]) for k in seen]))
    assert found["map_classes"] == 4
    decided = logits >= 0
    f1 = [2 * (decided[:, k] * labels[:, k]).sum() / (decided[:, k].sum() + labels[:, k].sum()) for k in seen]
    assert found["macro_f1"] == pytest.approx(100 * np.mean(f1))
    assert found["micro_f1"] == pytest.approx(200 * (decided * labels).sum() / (decided.sum() + labels.sum()))
    loss = F.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    with pytest.raises(BadValue, match="no image to evaluate on has a label"):
        average_precision(keep_scores(torch.tensor(logits), torch.zeros(40, 5)))


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 3)

    def forward(self, images):
        return self.layer(images[:, 0].flatten(1))


@pytest.mark.parametrize("batch_size", [5, 16])
def test_an_evaluation_in_batches_is_one_of_all_images(tmp_path, batch_size):
    splits = load_splits(str(labeled_csv(tmp_path, range(60), flags)), labeling=SEVERAL)
    to_tensor = lambda image: torch.tensor(np.asarray(image.convert("L"))).view(1, 8, 8) / 255  # noqa: E731
    images = Images(splits.train, to_tensor, NAMES)
    model, size = Linear(), splits.train.size
    loader = Loader(MapSampler(size, batch_size), images, Collate(batch_size, (1, 8, 8), 3))
    result = evaluate_model(model, loader.epoch(0), make_accelerator(), figures=figures_of(SEVERAL, 3))
    (whole,) = Loader(MapSampler(size, size), images, Collate(size, (1, 8, 8), 3)).epoch(0)
    with torch.no_grad():
        expected = average_precision(keep_scores(model(whole.images), whole.labels))
    assert result.images == size
    assert result.figures == pytest.approx(expected, rel=1e-6)


def batch(labels):
    images = torch.randn(len(labels), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return Batch(images, labels, torch.ones(len(labels)), torch.zeros(len(labels), 2, dtype=torch.long), [], [])


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))


MANY = torch.tensor([many_hot(k) for k in range(6)])


@pytest.mark.parametrize("loss", LOSSES["multilabel"])
def test_losses_are_timms(loss):
    model, own = network(), batch(MANY)
    found = ClassificationObjective(3, labeling=Labeling("multilabel", loss))(model, own)
    expected = create_classification_loss(loss, multi_label=True)(model(own.images), MANY)
    assert found.loss.shape == (6,)
    assert found.loss.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.metrics == {}


@pytest.mark.parametrize("enabled", [True, False])
def test_mixed_and_smoothed_labels_are_timms(enabled):
    model, own = network(), batch(MANY)
    mixup = Mixup(0.8, 0.0, label_smoothing=0.0, num_classes=3, multi_label=True)
    mixup.mixup_enabled = enabled
    found = ClassificationObjective(3, smoothing=0.1, labeling=SEVERAL, mixup=mixup, seed=3)(
        model, own._replace(images=own.images.clone()), 7, 0, 0
    )
    images, target = own.images, MANY * 0.9 + 0.05
    if enabled:
        timms = Mixup(0.8, 0.0, label_smoothing=0.1, num_classes=3, multi_label=True)
        with seeded(3, 7, 0, 0):
            images, target = timms(own.images.clone(), MANY)
    expected = F.binary_cross_entropy_with_logits(model(images), target)
    assert found.loss.mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_distillation_is_the_divergence_of_every_class():
    own, teacher, student = batch(MANY), network(), network()
    options = dict(labeling=SEVERAL, distill_weight=1.0, temperature=2.0)
    alone = ClassificationObjective(3, teacher=DistillationTeacher(teacher), **options)
    assert alone(student, own).loss.abs().max() < 1e-6  # the teacher itself
    with torch.no_grad():
        student[1].weight.mul_(0.5)
    p, q = (torch.sigmoid(m(own.images) / 2) for m in (teacher, student))
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(1) * 4
    assert torch.allclose(alone(student, own).loss, expected, atol=1e-6)
