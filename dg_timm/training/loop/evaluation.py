"""Exact figures under any number of processes.

Each process keeps a row of statistics an image; they are gathered once, put in the order of the data set and summed
in float64. Batches are filled up to one size, so that an image's logits don't depend on who shared its batch. The
result is that of one process to the last digit, whatever the sizes.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from dg_timm.training.data.loading import Batch
from dg_timm.training.loop.metrics import MeanLoss, TopKAccuracy


class Figures(NamedTuple):
    """Of one evaluation: mean cross-entropy, top-1 and top-5 (nan for fewer than 5 classes) in percent, images."""

    loss: float
    top1: float
    top5: float
    images: int


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    *,
    channels_last: bool = False,
    stop: Any = None,
) -> Figures:
    """Evaluate this process's ``batches`` and gather; every process gets the figures.

    Args:
        model: not wrapped for distributed training: processes may have different numbers of batches.
        stop: if given and ``stop()`` becomes true, the rest is left out (the figures are then of no use).

    Raises:
        ValueError: if there is no image.
    """
    training = model.training
    model.eval()
    kept = []
    for batch in batches:
        if stop is not None and stop():
            break
        batch = batch.on(accelerator.device, torch.channels_last if channels_last else torch.contiguous_format)
        with accelerator.autocast() if accelerator.mixed_precision != "no" else nullcontext():
            logits = model(batch.images).float()
        kept.append(statistics(logits, batch)[batch.weights > 0])
    model.train(training)
    width = 4 + 5
    mine = torch.cat(kept) if kept else torch.zeros(0, width, dtype=torch.float64, device=accelerator.device)
    if accelerator.num_processes > 1:
        mine = accelerator.pad_across_processes(mine, pad_index=-1)
        mine = accelerator.gather_for_metrics(mine)
        mine = mine[mine[:, 0] >= 0]
    table = mine.cpu()
    if len(table) == 0 and stop is not None and stop():
        return Figures(float("nan"), float("nan"), float("nan"), 0)
    if len(table) == 0:
        raise ValueError("there is no image to evaluate on")
    order = sorted(range(len(table)), key=table[:, :2].tolist().__getitem__)
    table = table[order]
    ranked = table[:, 4:].long()
    ranked = ranked[:, : int((ranked[0] >= 0).sum())]
    top = TopKAccuracy(keep_in_memory=True).compute(predictions=ranked.tolist(), references=table[:, 2].long().tolist())
    loss = MeanLoss(keep_in_memory=True).compute(predictions=table[:, 3].tolist())
    return Figures(loss["loss"], top["top1"], top.get("top5", float("nan")), len(table))


def statistics(logits: Tensor, batch: Batch) -> Tensor:
    """(batch, 9) float64: shard, row, label, loss, and the five best classes, best first (-1 beyond the classes)."""
    best = logits.topk(min(5, logits.shape[1])).indices
    best = F.pad(best, (0, 5 - best.shape[1]), value=-1)
    loss = F.cross_entropy(logits, batch.labels, reduction="none")
    columns = (batch.rows, batch.labels[:, None], loss[:, None], best)
    return torch.cat([column.double() for column in columns], dim=1)
