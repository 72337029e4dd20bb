"""Which paths images take, counted on figures that are known."""

import pytest
import timm
import torch

from dg_timm.experiments.image_stats import (
    ImageStats,
    by_class,
    by_difficulty,
    by_edge,
    class_distances,
    observe_images,
)
from dg_timm.experiments.paths import summarize
from dg_timm.training.data.images import Batch


@pytest.fixture
def stats():
    """Two classes of ten images, and one stage of three nodes: an edge by class, one always open, one closed."""
    labels = torch.arange(20) % 2
    by_label = torch.where(labels == 0, 0.0, 0.5)
    edges = torch.stack([by_label, torch.ones(20), torch.zeros(20)], dim=1)
    losses = torch.arange(20.0).flip(0)
    return ImageStats(labels, 1.0 - 0.1 * labels.double(), labels == 0, edges, losses)


def test_a_row_for_every_class(stats):
    zero, one = by_class(stats, ["zero", "one"])
    assert zero == {"class": "zero", "images": 10, "cost": 1.0, "cost_std": 0.0, "open": 0.3333, "top1": 100.0}
    assert one == {"class": "one", "images": 10, "cost": 0.9, "cost_std": 0.0, "open": 0.6667, "top1": 0.0}


def test_a_row_for_every_tenth_in_the_order_of_the_loss(stats):
    found = by_difficulty(stats)
    assert [row["tenth"] for row in found] == list(range(1, 11))
    assert [row["static_loss"] for row in found] == [2 * k + 0.5 for k in range(10)]
    assert {row["images"] for row in found} == {2}


def test_a_row_for_every_edge(stats):
    found = by_edge(stats, {"layer1": 3})
    assert [(row["source"], row["target"], row["open"], row["between_classes"]) for row in found] == [
        (0, 1, 0.5, 1.0),
        (0, 2, 1.0, 0.0),
        (1, 2, 0.0, 0.0),
    ]


def test_distances_of_classes_and_the_summary(stats):
    pairs = class_distances(stats, ["zero", "one"])
    assert pairs == [{"class": "zero", "other": "one", "distance": round(0.5 / 3, 5)}]
    text = summarize(stats, by_edge(stats, {"layer1": 3}), pairs)
    assert "20 images: cost 0.950" in text
    assert "3 edges: open for all images 1, for none 1, for some 1" in text


def test_images_are_observed_as_they_are_and_fillers_left_out():
    model, static = (timm.create_model(name, num_classes=2).eval() for name in ("dg_cifar_resnet20", "cifar_resnet20"))
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0])
    batch = Batch(images, labels, mask, torch.zeros(4, 2), [], [])
    stats = observe_images(model, static, [batch, batch])
    assert stats.labels.tolist() == [0, 1, 0] * 2
    with torch.no_grad():
        assert torch.allclose(stats.losses[:3], torch.nn.functional.cross_entropy(
            static(images), labels, reduction="none")[mask > 0], atol=1e-5)  # fmt: skip
    assert stats.edges.shape[0] == len(stats.costs) == 6
    assert (stats.costs > 1).all()
