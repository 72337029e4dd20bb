"""The figures of a classification as an ``evaluate.Metric``. It is made directly and needs no Hub."""

from typing import Any

import datasets
import evaluate
import numpy as np


class ClassificationMetrics(evaluate.Metric):
    """Mean loss, and the share of images whose label is among the best 1 and 5 predictions.

    ``ClassificationMetrics(keep_in_memory=True).compute(predictions=..., references=..., losses=...)``, or
    ``add_batch`` with the same arguments and then ``compute()``:

    - predictions: (n, k) class indices, the best one first;
    - references: (n,) class indices;
    - losses: (n,) floats, averaged in float64.

    Returns ``{"loss": ..., "top1": ..., "top5": ...}``, the last two in percent; ``top5`` only where k is at least 5.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("int64")),
            "references": datasets.Value("int64"),
            "losses": datasets.Value("float64"),
        }
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any, losses: Any) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        top = {f"top{k}": 100 * float(hits[:, :k].any(1).mean()) for k in (1, 5) if k <= hits.shape[1]}
        return {"loss": float(np.mean(np.asarray(losses, dtype=np.float64))), **top}
