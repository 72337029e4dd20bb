"""Metrics as ``evaluate.Metric`` classes. They are made directly, ``TopKAccuracy().compute(...)``, and need no Hub."""

from typing import Any

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """Share of the images whose label is among the first ``k`` predictions, for every k up to the number given.

    ``compute(predictions=..., references=...)``: predictions (n, k), class indices, best first; references (n,).
    Returns ``{"top1": ..., "top5": ...}`` in percent (top5 only where k >= 5).
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
        return _info(self, features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {f"top{k}": 100 * float(hits[:, :k].any(1).mean()) for k in (1, 5) if k <= hits.shape[1]}


class MeanLoss(evaluate.Metric):
    """Mean of per-image losses, summed in float64. ``compute(predictions=losses)`` returns ``{"loss": ...}``."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, {"predictions": datasets.Value("float64")})

    def _compute(self, predictions: Any) -> dict[str, float]:
        return {"loss": float(np.mean(np.asarray(predictions, dtype=np.float64)))}


def _info(metric: evaluate.Metric, features: dict[str, Any]) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=metric.__doc__ or "", citation="", inputs_description="", features=datasets.Features(features)
    )
