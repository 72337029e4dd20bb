"""Metrics and the figures of an evaluation, against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dg_timm
from dg_timm._errors import BadValue
from dg_timm.analysis.counting import count_costs
from dg_timm.graph.stage import graph_stages
from dg_timm.training.data.images import Batch, Collate, Images
from dg_timm.training.data.loader import Loader
from dg_timm.training.data.samplers import MapSampler
from dg_timm.training.data.sources import load_splits
from dg_timm.training.loop.distributed import make_accelerator
from dg_timm.training.loop.evaluation import evaluate_model, graph_statistics
from dg_timm.training.loop.metrics import ClassificationMetrics
from dg_timm.training.run import operating_points
from tests.helpers.networks import gated_network, static_and_dynamic


def test_metrics_work_without_the_hub():
    predictions = [[3, 1, 2, 0, 4], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 0, 2, 3, 4]]
    metric = ClassificationMetrics(keep_in_memory=True)
    metric.add_batch(predictions=predictions[:3], references=[3, 2, 5], losses=[1.0, 2.0, 6.0])
    metric.add_batch(predictions=predictions[3:], references=[9], losses=[7.0])
    assert metric.compute() == {"loss": 4.0, "top1": 25.0, "top5": 50.0}
    few = ClassificationMetrics(keep_in_memory=True).compute(predictions=[[1, 0]], references=[0], losses=[0.1])
    assert few == {"loss": 0.1, "top1": 0.0}


def test_losses_are_averaged_in_float64():
    losses = [1e8, 1.0, -1e8, 1.0]  # float32 would lose the ones
    found = ClassificationMetrics(keep_in_memory=True).compute(predictions=[[0]] * 4, references=[0] * 4, losses=losses)
    assert found["loss"] == 0.5


class Linear(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images[:, 0].flatten(1))


def loader(batch_size: int) -> Loader:
    splits = load_splits("digits")
    images = Images(splits.test, lambda image: torch.tensor(np.asarray(image.convert("L"))).view(1, 8, 8) / 255,
                    splits.label_names)  # fmt: skip
    return Loader(MapSampler(len(splits.test.rows), batch_size), images, Collate(batch_size, (1, 8, 8)))


@pytest.mark.parametrize("batch_size", [7, 64, 360, 500])
def test_figures_are_those_of_all_logits_at_once(batch_size):
    model = Linear(10).train()
    result = evaluate_model(model, loader(batch_size).epoch(0), make_accelerator())
    (everything,) = loader(360).epoch(0)
    logits, labels = model(everything.images), everything.labels
    assert result.images == 360
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    best = logits.topk(5).indices
    assert result.top5 == pytest.approx(100 * (best == labels[:, None]).any(1).float().mean().item())


def test_fewer_classes_than_five_have_no_top5():
    batches = (batch._replace(labels=batch.labels % 3) for batch in loader(64).epoch(0))
    result = evaluate_model(Linear(3), batches, make_accelerator())
    assert math.isnan(result.top5)
    assert 0 <= result.top1 <= 100


def test_nothing_to_evaluate_on():
    with pytest.raises(BadValue, match="there is no image to evaluate on"):
        evaluate_model(Linear(3), [], make_accelerator())
    assert math.isnan(evaluate_model(Linear(3), [], make_accelerator(), stop=lambda: True).loss)


def frozen_inside() -> nn.Sequential:
    """A model in training mode, one module of which is frozen in eval mode."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).train()
    model[1].eval()
    return model


def test_every_module_gets_its_own_mode_back():
    model = frozen_inside()
    evaluate_model(model, loader(64).epoch(0), make_accelerator())
    assert [module.training for module in model] == [True, False, True]


def test_every_module_gets_its_own_mode_back_after_an_exception():
    model = frozen_inside()

    def batches():
        yield next(loader(64).epoch(0))
        raise BadValue("unreadable image in row 3")

    with pytest.raises(BadValue, match="row 3"):
        evaluate_model(model, batches(), make_accelerator())
    assert [module.training for module in model] == [True, False, True]


def test_rows_that_only_fill_a_batch_up_count_nothing():
    (whole,) = loader(360).epoch(0)
    mask = torch.zeros(360)
    mask[:100] = 1
    part = Batch(*(value[:100] for value in whole[:4]), [], [])
    model = Linear(10)
    masked = evaluate_model(model, [whole._replace(sample_mask=mask)], make_accelerator())
    alone = evaluate_model(model, [part], make_accelerator())
    assert masked.images == alone.images == 100
    assert (masked.top1, masked.top5) == (alone.top1, alone.top5)
    assert masked.loss == pytest.approx(alone.loss, rel=1e-6)


def test_statistics_of_a_graph_are_those_of_its_adjacency():
    static, dynamic = static_and_dynamic("dg_resnet18", num_classes=3)
    images = torch.randn(3, 3, 32, 32)
    row = graph_statistics(dynamic, images)
    for name, alpha in dg_timm.adjacency(dynamic, images).items():
        nodes = alpha.shape[-1]
        edges = torch.stack([alpha[:, i, j] for i in range(nodes) for j in range(i + 1, nodes)])
        assert row[f"{name}.weight"] == pytest.approx(edges.mean().item(), abs=1e-5)
        assert row[f"{name}.open"] == pytest.approx((edges != 0).float().mean().item(), abs=1e-5)
    assert len(row) == 2 * len(graph_stages(dynamic)) + 1
    assert row["cost"] == pytest.approx(dg_timm.cost(dynamic, images).mean().item(), abs=1e-5)
    assert graph_statistics(static, images) == {}


@pytest.mark.parametrize("mark", [1.0, 0.0])
def test_of_a_cascade_both_passes_count(mark):
    model, images = gated_network()
    dg_timm.set_cascade(model, (0.0, 1.0), threshold=0.5)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    ones = torch.ones(len(images))
    ones[-1] = mark  # a row that only fills the batch
    batch = Batch(images, labels, ones, torch.zeros(len(images), 2), [], [])
    top1, costs = operating_points.predict(model, [batch])
    counts = ones > 0
    assert top1 == pytest.approx(100 * (1 - 1 / counts.sum().item()))
    torch.testing.assert_close(costs, dg_timm.cost(model, images)[counts])
    found = evaluate_model(
        model, [batch], make_accelerator(mixed_precision="no"), costs=count_costs(model, (3, 32, 32))
    )
    assert found.top1 == pytest.approx(top1)
    torch.testing.assert_close(found.costs.mean(), costs.mean())
