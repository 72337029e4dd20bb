"""Losses of a batch, against closed forms and timm's or torch's own."""

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.task.distillation import DistillationTeacher

from dg_timm.hub.labeling import Labeling
from dg_timm.training.data.images import Batch
from dg_timm.training.data.seeding import seeded
from dg_timm.training.loop.objective import ClassificationObjective


def batch(n=6, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 4, 4, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return Batch(images, labels, torch.ones(n), torch.zeros(n, 2, dtype=torch.long), [], [])


def network(classes=5):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, classes))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing):
    model, own = network(), batch()
    losses = ClassificationObjective(5, smoothing=smoothing)(model, own, 0)
    expected = F.cross_entropy(model(own.images), own.labels, label_smoothing=smoothing)
    assert losses.loss.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.metrics["top1"].tolist() == (100.0 * (model(own.images).argmax(1) == own.labels)).tolist()


def test_mixup_is_timms_and_repeats_itself():
    model, own = network(), batch()
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
    objective = ClassificationObjective(5, smoothing=0.1, mixup=mixup, seed=3)
    first = objective(model, own._replace(images=own.images.clone()), 7, 0, 0)
    again = objective(model, own._replace(images=own.images.clone()), 7, 0, 0)
    other = objective(model, own._replace(images=own.images.clone()), 8, 0, 0)
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.loss, other.loss)
    with seeded(3, 7, 0, 0):
        images, target = mixup(own.images.clone(), own.labels)
    assert first.loss.mean().item() == pytest.approx(SoftTargetCrossEntropy()(model(images), target).item(), rel=1e-6)
    mixup.mixup_enabled = False  # after the off-epoch
    plain = objective(model, own, 7, 0, 0)
    assert torch.equal(plain.loss, ClassificationObjective(5, smoothing=0.1)(model, own).loss)


def test_binary_cross_entropy_is_torchs():
    model, own = network(), batch()
    losses = ClassificationObjective(5, labeling=Labeling("single", "bce"))(model, own)
    expected = F.binary_cross_entropy_with_logits(model(own.images), F.one_hot(own.labels, 5).float())
    assert losses.loss.mean().item() == pytest.approx(expected.item(), rel=1e-6)


def test_distillation():
    own = batch()
    teacher, student = network(), network()
    alone = ClassificationObjective(5, teacher=DistillationTeacher(teacher), distill_weight=1.0, temperature=2.0)
    assert alone(student, own).loss.abs().max() < 1e-6  # the teacher itself
    with torch.no_grad():
        student[1].weight.mul_(0.5)
    p, q = (F.softmax(m(own.images) / 2, 1) for m in (teacher, student))
    expected = (p * (p.log() - q.log())).sum(1) * 4
    assert torch.allclose(alone(student, own).loss, expected, atol=1e-6)
    half = ClassificationObjective(5, teacher=DistillationTeacher(teacher), distill_weight=0.5, temperature=2.0)
    mixed = 0.5 * F.cross_entropy(student(own.images), own.labels, reduction="none") + 0.5 * expected
    assert torch.allclose(half(student, own).loss, mixed, atol=1e-6)
