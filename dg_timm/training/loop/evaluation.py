"""Evaluate a classifier exactly, whatever the number of processes.

Each process keeps a row of statistics for every image; the rows are gathered once, put in the order of the data set and
summed in float64. Batches are filled up to one size, so that an image's logits don't depend on who shared its batch.
The result is that of one process to the last digit, whatever the number of images.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm._modes import evaluating
from dg_timm.analysis.counting import Costs, recorded_cost, relative_cost
from dg_timm.analysis.recorder import AdjacencyRecorder, adjacency, recording
from dg_timm.graph.stage import graph_stages
from dg_timm.hub.labeling import SINGLE
from dg_timm.training.data.images import Batch
from dg_timm.training.loop.distributed import HostAllReduce
from dg_timm.training.loop.figures import Figures, figures_of
from dg_timm.training.loop.report import Row
from dg_timm.training.loop.sharding import in_step

_ROW, _COSTS = 2, 2  # columns: shard and row, cost and skipped


class EvalResult(NamedTuple):
    """The result of one evaluation.

    Attributes:
        figures: by name, those of the task (:mod:`dg_timm.training.loop.figures`); ``loss`` is among them.
        images: how many were evaluated.
        costs: (images,) float64, of each relative to the static network; nan where costs were not asked for.
        skipped: (images,), the share of blocks that each skips.
    """

    figures: dict[str, float]
    images: int
    costs: Tensor
    skipped: Tensor

    @property
    def loss(self) -> float:
        """Mean loss; nan where an evaluation was stopped."""
        return self.figures.get("loss", float("nan"))

    @property
    def top1(self) -> float:
        """Percent of the images whose label is the best class; nan where a task has no such figure."""
        return self.figures.get("top1", float("nan"))

    @property
    def top5(self) -> float:
        """Percent of the images whose label is among the best five; nan for fewer classes."""
        return self.figures.get("top5", float("nan"))


@torch.no_grad()  # not inference_mode: a sharded network keeps what it gathers, and trains with it
def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    *,
    channels_last: bool = False,
    costs: Costs | None = None,
    stop: Callable[[], bool] | None = None,
    figures: Figures | None = None,
    fill: Callable[[], Batch] | None = None,
    all_reduce: HostAllReduce | None = None,
) -> EvalResult:
    """Evaluate this process's batches and gather the result; every process gets it.

    Args:
        model: not wrapped for distributed training, since processes may have different numbers of batches. Its modules
            run in eval mode, and get their own modes back, also after an exception.
        batches: of this process.
        channels_last: memory layout of the images.
        costs: of the model, a dynamic one in dense execution; without them none are added up.
        stop: if given and ``stop()`` becomes true, the rest is left out. The result is then of no use.
        figures: of the task; by default those of a single label.
        fill, all_reduce: for a sharded model, which all processes have to run equally often: a batch in which nothing
            counts, and sums over the processes.

    Raises:
        BadValue: if there is no image.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    figures = figures or figures_of(SINGLE, 0)
    kept = []
    until = _until(batches, stop or (lambda: False), fill, all_reduce)
    with evaluating(model):
        for batch in until:
            batch = batch.move_to(accelerator.device, layout)
            precision = accelerator.autocast() if accelerator.mixed_precision != "no" else nullcontext()
            with precision, recording(model) if costs is not None else nullcontext() as recorder:
                logits = model(batch.images).float()
            rows = torch.cat([batch.rows.double(), figures.keep(logits, batch.labels)], dim=1)
            kept.append(torch.cat([rows, _cost_columns(model, costs, recorder, rows)], dim=1)[batch.sample_mask > 0])
    empty = torch.zeros(0, _ROW + figures.width + _COSTS, dtype=torch.float64, device=accelerator.device)
    mine = torch.cat(kept) if kept else empty
    if accelerator.num_processes > 1:
        mine = accelerator.pad_across_processes(mine, pad_index=-1)
        mine = accelerator.gather_for_metrics(mine)
        mine = mine[mine[:, 0] >= 0]
    if stop is not None and stop():
        return EvalResult({figures.metric.name: float("nan")}, 0, mine[:, -2], mine[:, -1])
    if len(mine) == 0:
        raise BadValue("there is no image to evaluate on")
    table = mine.cpu()
    table = table[sorted(range(len(table)), key=table[:, :_ROW].tolist().__getitem__)]
    return EvalResult(figures.summarize(table[:, _ROW:-_COSTS]), len(table), table[:, -2], table[:, -1])


def _until(
    batches: Iterable[Batch],
    stop: Callable[[], bool],
    fill: Callable[[], Batch] | None,
    all_reduce: HostAllReduce | None,
) -> Iterator[Batch]:
    if fill is None or all_reduce is None:
        return itertools.takewhile(lambda _: not stop(), batches)
    return in_step(iter(batches), fill, stop, all_reduce.sum)


def _cost_columns(model: nn.Module, costs: Costs | None, recorder: AdjacencyRecorder | None, rows: Tensor) -> Tensor:
    """The cost of every image and the share of blocks that its first pass skips: (batch, 2); nan without costs."""
    if costs is None or recorder is None:
        return rows.new_full((len(rows), 2), float("nan"))
    blocks = [of_stage[:, 1:-1].double() for of_stage in recorder.skipped.values()]
    skipped = torch.cat(blocks, 1).mean(1) if blocks else torch.zeros_like(rows[:, 0])
    return torch.stack([recorded_cost(model, recorder, costs), skipped], dim=1)


def graph_statistics(model: nn.Module, images: Tensor) -> Row:
    """Describe what the graph of a model does with some images.

    Args:
        images: (batch, channels, height, width).

    Returns:
        for every stage its mean open edge weight (``NAME.weight``) and its share of open edges (``NAME.open``), and the
        mean ``cost`` relative to the static network; nothing for a static model.
    """
    if not graph_stages(model):
        return {}
    weights = adjacency(model, images)
    row: Row = {}
    for name, alpha in weights.items():
        n = alpha.shape[-1]
        upper = torch.triu_indices(n, n, 1, device=alpha.device)
        edges = alpha[:, upper[0], upper[1]].float()
        row[f"{name}.weight"] = round(edges.mean().item(), 5)
        row[f"{name}.open"] = round((edges != 0).float().mean().item(), 5)
    size = (images.shape[1], images.shape[2], images.shape[3])
    row["cost"] = round(relative_cost(model, weights, size).mean().item(), 5)
    return row
