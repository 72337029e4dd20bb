"""Short trainings on real images: they find what no forward pass shows."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import dg_timm
from dg_timm.graph.stage import graph_stages, routers
from dg_timm.training.data.images import Collate, Images
from dg_timm.training.data.loader import Loader
from dg_timm.training.data.samplers import MapSampler
from dg_timm.training.data.sources import load_splits
from tests.helpers.networks import FAMILIES

SIZE = 32


@pytest.fixture(scope="module")
def digits():
    splits = load_splits("digits")
    transform = timm.data.create_transform((3, SIZE, SIZE), interpolation="bilinear", crop_pct=1.0)
    both = []
    for split in (splits.train, splits.test):
        images = Images(split, transform, splits.label_names)
        loader = Loader(MapSampler(split.size, split.size), images, Collate(split.size, (3, SIZE, SIZE)))
        (batch,) = loader.epoch(0)
        both.append((batch.images, batch.labels))
    return both


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: len(images) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_statistics: bool) -> float:
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(batch_statistics)
            module.momentum = 0.0  # keep the running statistics
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "dg_resnet50"])
def test_running_statistics_serve_as_well_as_batch_statistics(name, digits):
    """One distribution through each BatchNorm: a projection that ran twice would lose 2 to 20 points in eval."""
    (images, labels), (test_images, test_labels) = digits
    model = timm.create_model(name, num_classes=10)
    train(model, images, labels, epochs=8, lr=3e-3)
    evaluated = accuracy(model, test_images, test_labels, batch_statistics=False)
    with_batch = accuracy(model, test_images, test_labels, batch_statistics=True)
    print(f"{name}: eval {evaluated:.2f}, batch statistics {with_batch:.2f}")
    assert evaluated > 85
    assert evaluated >= with_batch - 1.0


@pytest.mark.slow
def test_resnet101_trains_in_bfloat16_autocast_without_overflow():
    model = timm.create_model("dg_resnet101", num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_thresholds_close_edges_when_the_loss_asks_for_it(digits):
    """Eq. 5 learns: a reward for high thresholds raises them until edges close, and the network goes on working."""
    (images, labels), (test_images, test_labels) = digits
    model = timm.create_model("dg_regnetx_002", num_classes=10)
    train(model, images, labels, epochs=4, lr=3e-3)
    open_before = open_edges(model, test_images)
    thresholds = [router.threshold for router in routers(model).values()]
    optimizer = torch.optim.SGD(thresholds, lr=0.02)
    for batch in torch.randperm(len(images)).split(64)[:20]:
        optimizer.zero_grad()
        task = F.cross_entropy(model(images[batch]), labels[batch])
        (task - 0.25 * sum(threshold.sum() for threshold in thresholds)).backward()
        optimizer.step()
    open_after = open_edges(model, test_images)
    assert open_after.keys() == open_before.keys() == graph_stages(model).keys()
    assert sum(open_after.values()) < sum(open_before.values())
    assert (model(test_images).argmax(1) == test_labels).float().mean() > 0.5


def open_edges(model: nn.Module, images: torch.Tensor) -> dict[str, int]:
    """The number of open edges of every stage over some images, in eval mode."""
    found = dg_timm.adjacency(model.eval(), images)
    return {
        name: int((alpha[:, torch.ones(alpha.shape[1:]).triu(1).bool()] != 0).sum()) for name, alpha in found.items()
    }
