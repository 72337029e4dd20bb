"""The loss of a detector's batch."""

from collections.abc import Callable
from typing import Any

import torch

from dg_timm.detection.data.loading import DetectionBatch
from dg_timm.training.data.loading import seeded
from dg_timm.training.loop.objective import Losses


class Detection:
    """The sum of the detector's own losses; each of them is shown.

    torchvision averages over the boxes of a batch, so every image of a batch gets the batch's mean.

    Args:
        seed: of what the detector draws (image size, regions to learn from).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, model: Callable[..., Any], batch: DetectionBatch, update: int, *others: int) -> Losses:
        """Losses of a batch. Images without weight are left out; where there are no others, one runs for nothing."""
        counted = batch.weights.nonzero()[:, 0].tolist() or [0]
        # of the update and the images alone: how many processes share an update does not matter
        with seeded(self.seed, update, *(int(batch.rows[k, 1]) + 1 for k in counted)):
            losses = model([batch.images[k] for k in counted], [batch.targets[k] for k in counted])
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        return Losses(
            total.expand(len(batch.weights)),
            {name: loss.detach().float().expand(len(batch.weights)) for name, loss in losses.items()},
        )
