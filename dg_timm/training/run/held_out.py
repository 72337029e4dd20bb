"""The held-out images of a classification: figures while a network learns, and the cascade that ends it."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dg_timm.analysis.counting import Costs, count_costs
from dg_timm.budget.choice import BudgetChoice, choose_among, set_choice
from dg_timm.budget.curve import keep_curve, measure_budgets, observe_budget
from dg_timm.graph.stage import graph_stages
from dg_timm.training.data.loader import Loader, sample_images
from dg_timm.training.loop.distributed import HostAllReduce
from dg_timm.training.loop.evaluation import evaluate_model, graph_statistics
from dg_timm.training.loop.figures import figures_of
from dg_timm.training.loop.report import TOP1, Row
from dg_timm.training.run.build import Network
from dg_timm.training.run.targets import Aim, evaluate_targets

CURVE_POINTS, CURVE_IMAGES = 6, 512  # of the curve of budgets that is saved with a network
GRAPH_IMAGES = 64  # over which the graph's statistics are averaged each epoch


class HeldOut:
    """The figures of a network on the held-out images: accuracy, cost where one is aimed at, and the graph's."""

    def __init__(
        self,
        args: argparse.Namespace,
        network: Network,
        val_loader: Loader,
        accelerator: Accelerator,
        aim: Aim | None,
    ) -> None:
        self.args, self.val_loader, self.accelerator, self.aim = args, val_loader, accelerator, aim
        self.all_reduce = HostAllReduce() if args.fsdp else None
        self.num_classes = network.objective.num_classes
        self.figures = figures_of(network.objective.labeling, self.num_classes)
        self.costs: Costs | None = None
        if aim is not None:
            self.costs = count_costs(network.model, network.data_config["input_size"])
        self.sample: Tensor | None = None
        if graph_stages(network.model) and accelerator.is_main_process:
            self.sample = sample_images(val_loader, GRAPH_IMAGES).to(accelerator.device)

    def evaluate(self, candidate: nn.Module, stopping: Callable[[], bool]) -> Row:
        """Evaluate on all held-out images."""
        if self.aim is None:
            return self._evaluate(candidate, stopping, None)
        evaluate = partial(self._evaluate, candidate, stopping, self.costs)
        return evaluate_targets(self.aim, self.figures.metric, evaluate)

    def _evaluate(self, candidate: nn.Module, stopping: Callable[[], bool], costs: Costs | None) -> Row:
        result = evaluate_model(
            candidate,
            self.val_loader.epoch(0),
            self.accelerator,
            channels_last=self.args.channels_last,
            costs=costs,
            stop=stopping,
            figures=self.figures,
            fill=self.val_loader.empty_batch,
            all_reduce=self.all_reduce,
        )
        row: Row = {key: value for key, value in result.figures.items() if key != "top5" or self.num_classes > 5}
        if costs is not None:
            spread = result.costs.std(unbiased=False).item()
            row |= {
                "cost": result.costs.mean().item(),
                "spread": spread,
                "skipped": 100 * result.skipped.mean().item(),
            }
        return row

    def keep_curve(self, best: nn.Module) -> None:
        """Measure what a network that was trained for a range does at budgets from end to end, and keep it."""
        if self.aim is None or not self.aim.is_range:
            return
        budgets = torch.linspace(*self.aim.targets, CURVE_POINTS).tolist()
        batches = -(-CURVE_IMAGES // self.val_loader.sampler.batch_size)
        keep_curve(best, measure_budgets(best, list(itertools.islice(self._pairs(), batches)), budgets))

    def choose_cascade(self, best: nn.Module) -> tuple[BudgetChoice, int]:
        """Choose the cascade that the training aims at, and set it; give the number of images, too.

        Raises:
            BadValue: if no cascade costs so little.
        """
        assert self.aim is not None
        observed = {budget: observe_budget(best, self._pairs(), budget) for budget in self.aim.targets}
        choice = choose_among(observed, target_cost=self.aim.cascade, only_cascades=True)
        set_choice(best, choice)
        return choice, len(observed[choice.budgets[0]].costs)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Give the held-out images of this process, with their labels where each has one."""
        layout = torch.channels_last if self.args.channels_last else torch.contiguous_format
        for batch in self.val_loader.epoch(0):
            moved = batch.move_to(self.accelerator.device, layout)
            own = moved.sample_mask > 0
            yield moved.images[own], moved.labels[own] if self.figures.metric is TOP1 else None

    def observe(self, candidate: nn.Module) -> Row:
        """Describe the graph on some of the images."""
        return graph_statistics(candidate, self.sample) if self.sample is not None else {}
