"""The loss of a detector over a batch."""

from collections.abc import Callable
from typing import Any

import torch

from dg_timm.detection.data.loading import DetectionBatch
from dg_timm.training.data.seeding import seeded
from dg_timm.training.loop.objective import Losses


class DetectionObjective:
    """The sum of the detector's own losses; each of them is shown.

    torchvision averages over the boxes of a batch, so every image of a batch gets the mean of the batch.

    Args:
        seed: the seed of what a detector draws in training (image size, regions to learn from).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, model: Callable[..., Any], batch: DetectionBatch, update: int, *others: int) -> Losses:
        """Compute the losses of the images that count; if none counts, of one, so that every gradient exists.

        Args:
            model: a torchvision detector in training mode, in or out of a wrapper.
            update: number of the update. What the detector draws depends on it, on the seed and on the images alone,
                not on how many processes share an update.
            others: further numbers that the trainer passes; ignored.
        """
        counted = batch.passing
        with seeded(self.seed, update, *(int(batch.rows[k, 1]) + 1 for k in counted)):
            losses = model([batch.images[k] for k in counted], [batch.targets[k] for k in counted])
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        size = len(batch.sample_mask)
        metrics = {name: loss.detach().float().expand(size) for name, loss in losses.items()}
        return Losses(total.expand(size), metrics)
