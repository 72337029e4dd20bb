"""What a task gives to the training loop."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from dg_timm.training.data.loader import Loader
from dg_timm.training.loop.objective import Losses
from dg_timm.training.loop.optimization import BatchSplit
from dg_timm.training.loop.report import Metric, Row


@dataclass(frozen=True)
class TrainingTask:
    """What tasks differ in: network, data, loss and figures.

    Attributes:
        model: on the CPU, with what must not learn frozen.
        objective: (model, batch, *entropy) -> :class:`dg_timm.training.loop.objective.Losses`.
        loader: training batches of this process.
        val_loader: batches to evaluate on.
        updates_per_epoch: number of updates of the weights.
        evaluate: (network, whether to stop) -> its figures, the same in every process; the metric is among them.
        metric: the figure that is to grow.
        observe: (network) -> figures of the main process alone, such as those of the graph; after every evaluation.
        write_config: (network, folder): writes config.json, beside the weights in every checkpoint.
        export: (network, row of the summary, epochs of the run, whether it is the average of the weights): writes the
            best network so far, in the main process.
        images: the data in words, e.g. ``1437 images, 10 classes``.
        conclude: (row of the summary, of the best epoch; epochs of the run) -> a line for the end of the run, or None.
        on_epoch: (epoch), is called before each.
        fixed_norms: leave all norm statistics as they are.
        fsdp: share the network out over the processes; its evaluation keeps them in step.
    """

    model: Any
    objective: Callable[..., Losses]
    loader: Loader
    val_loader: Loader
    updates_per_epoch: int
    evaluate: Callable[[nn.Module, Callable[[], bool]], Row]
    metric: Metric
    observe: Callable[[nn.Module], Row]
    write_config: Callable[[nn.Module, Path], object]
    export: Callable[[nn.Module, Row, int, bool], None]
    images: str
    conclude: Callable[[Row, int], str | None] = lambda row, epochs: None
    on_epoch: Callable[[int], None] = lambda epoch: None
    fixed_norms: bool = False
    fsdp: bool = False


Build = Callable[[argparse.Namespace, Accelerator, BatchSplit], TrainingTask]
