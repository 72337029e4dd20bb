"""Metrics and the figures of an evaluation, against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dg_timm.training.data.loading import Collate, Images, IndexOrder, Loader
from dg_timm.training.data.sources import load_splits
from dg_timm.training.loop.distributed import make_accelerator
from dg_timm.training.loop.evaluation import evaluate_model
from dg_timm.training.loop.metrics import MeanLoss, TopKAccuracy


def test_metrics_work_without_the_hub():
    predictions = [[3, 1, 2, 0, 4], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 0, 2, 3, 4]]
    metric = TopKAccuracy(keep_in_memory=True)
    metric.add_batch(predictions=predictions[:3], references=[3, 2, 5])
    metric.add_batch(predictions=predictions[3:], references=[9])
    assert metric.compute() == {"top1": 25.0, "top5": 50.0}
    assert TopKAccuracy(keep_in_memory=True).compute(predictions=[[1, 0]], references=[0]) == {"top1": 0.0}
    assert MeanLoss(keep_in_memory=True).compute(predictions=[1.0, 2.0, 6.0]) == {"loss": 3.0}


class Linear(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images[:, 0].flatten(1))


def loader(batch_size: int) -> Loader:
    splits = load_splits("digits")
    images = Images(splits.test, lambda image: torch.tensor(list(image.convert("L").getdata())).view(1, 8, 8) / 255,
                    splits.label_names)  # fmt: skip
    return Loader(IndexOrder(len(splits.test.rows), batch_size), images, Collate(batch_size, (1, 8, 8)))


@pytest.mark.filterwarnings("ignore:Image.Image.getdata")
@pytest.mark.parametrize("batch_size", [7, 64, 360, 500])
def test_figures_are_those_of_all_logits_at_once(batch_size):
    model = Linear(10).train()
    figures = evaluate_model(model, loader(batch_size).epoch(0), make_accelerator())
    (everything,) = loader(360).epoch(0)
    logits, labels = model(everything.images), everything.labels
    assert figures.images == 360
    assert figures.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert figures.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    best = logits.topk(5).indices
    assert figures.top5 == pytest.approx(100 * (best == labels[:, None]).any(1).float().mean().item())
    assert model.training  # left as it was


@pytest.mark.filterwarnings("ignore:Image.Image.getdata")
def test_fewer_classes_than_five_have_no_top5():
    batches = (batch._replace(labels=batch.labels % 3) for batch in loader(64).epoch(0))
    figures = evaluate_model(Linear(3), batches, make_accelerator())
    assert math.isnan(figures.top5)
    assert 0 <= figures.top1 <= 100


def test_nothing_to_evaluate_on():
    with pytest.raises(ValueError, match="there is no image to evaluate on"):
        evaluate_model(Linear(3), [], make_accelerator())
    assert math.isnan(evaluate_model(Linear(3), [], make_accelerator(), stop=lambda: True).loss)
