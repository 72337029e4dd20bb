"""What the finished networks of :mod:`dg_timm.experiments.skipping` do: image by image, and on the clock."""

import argparse
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dg_timm._errors import BadValue
from dg_timm._files import atomic_write
from dg_timm._hardware import describe_hardware
from dg_timm.budget.choice import choose_among, set_choice
from dg_timm.budget.curve import observe_budget, set_budget
from dg_timm.execution.settings import set_execution
from dg_timm.experiments.image_costs import (
    Images,
    Row,
    budget_rows,
    cascade_rows,
    certainty_rows,
    observe_budgets,
    weigh_images,
)
from dg_timm.experiments.store import TrialStore
from dg_timm.experiments.trial import Result
from dg_timm.graph.gate import gates
from dg_timm.training.run import networks, operating_points
from dg_timm.training.run.timing import time_columns, time_ratios

BUDGETS = (0.6, 0.7, 0.8, 0.9, 1.0)  # at which a range is observed
CASCADES = (0.65, 0.7, 0.75, 0.8)  # target costs of cascades
TIMED_CASCADE = 0.7
_TIMED_IMAGES, _CHOSEN_ON = 64, 512


def load_batches(store: TrialStore, network: Path, *words: str) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Load the test images of the experiment, and some training images, preprocessed as a network wants them.

    Args:
        store: knows the data.
        network: folder of the network.
        words: further options of :func:`dg_timm.training.run.operating_points.add_options`.

    Returns:
        batches of (images, labels), and of images.
    """
    parser = argparse.ArgumentParser()
    operating_points.add_options(parser)
    given = ["--data", store.data, *words]
    given += ["--val-limit", store.overrides["val-limit"]] if "val-limit" in store.overrides else []
    args = argparse.Namespace(**vars(parser.parse_args(given)), model=str(network))
    batches, some = operating_points.load_batches(args, networks.create(str(network)))
    kept = [(batch.images, batch.labels, batch.sample_mask > 0) for batch in batches]
    return [(images[own], labels[own]) for images, labels, own in kept], some


class Observer:
    """Observes the networks of one seed, on the test images and beside the static network of that seed.

    Args:
        store: of the trials.
        static: the static network that was trained as long.
    """

    def __init__(self, store: TrialStore, static: Result) -> None:
        self.store, self.static = store, static
        self._images: Images | None = None

    @property
    def images(self) -> Images:
        """The test images, loaded once."""
        if self._images is None:
            batches, _ = load_batches(self.store, self.static.network, "--refit-norms", "0")
            self._images = weigh_images(networks.create(str(self.static.network)), batches)
        return self._images

    def rows(self, result: Result) -> list[Row]:
        """Give what a network with gates does at its budgets and in cascades; kept as JSON beside the results.

        Nothing for a network without gates, or one that is gone and was not observed before.
        """
        file = self.store.results / f"{result.trial.folder}-images.json"
        options = {"network": self.store.options(result.trial), "static": self.store.options(self.static.trial)}
        if file.exists():
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if kept["options"] == options:
                return list(kept["rows"])
        if not (result.network.exists() and self.static.network.exists()):
            return []
        model = networks.create(str(result.network)).eval()
        if not gates(model):
            return []
        is_range = result.trial.name == "range"
        observed = observe_budgets(model, self.images, BUDGETS if is_range else BUDGETS[-1:])
        found = budget_rows(observed, self.images)
        if is_range:
            found += cascade_rows(observed, self.images, CASCADES) + certainty_rows(observed, self.images)
        named = [{"network": result.trial.name, "seed": result.trial.seed, **row} for row in found]
        atomic_write(file, json.dumps({"options": options, "rows": named}, indent=1) + "\n")
        return named


def time_networks(
    store: TrialStore, results: Sequence[Result], static: Result, sizes: Sequence[int], rounds: int
) -> list[Row]:
    """Time finished networks of one seed in sparse execution beside the static one, on real images.

    A range is timed at its lowest budget, with every gate open, and as a cascade if one costs so little.

    Args:
        store: of the trials.
        results: networks with gates, or fixed ones.
        static: their static network.
        sizes: of batches.
        rounds: at least 2; every network runs once a round.

    Returns:
        a row for each network, with the columns of :func:`dg_timm.training.run.timing.time_columns`.
    """
    batches, _ = load_batches(store, static.network, "--refit-norms", "0")
    images = torch.cat([of_batch for of_batch, _ in batches])
    contestants: dict[str, Any] = {}
    for result in results:
        contestants |= _timed(result, batches)
    plain = networks.create(str(static.network)).eval()
    rows: list[Row] = [{"network": name, "threads": torch.get_num_threads()} for name in contestants]
    for size in sizes:
        some = images[: max(_TIMED_IMAGES, 2 * size)]
        found = time_ratios(plain, list(contestants.values()), some, size, rounds)
        for row, timing in zip(rows, found, strict=True):
            row |= time_columns(size, timing)
    return [row | {"rounds": rounds, "hardware": describe_hardware()} for row in rows]


def _timed(result: Result, batches: Sequence[tuple[Tensor, Tensor]]) -> Mapping[str, Any]:
    def load(**budget: Any) -> Any:
        model = networks.create(str(result.network)).eval()
        set_execution(model, "sparse" if gates(model) else "dense")
        if budget:
            set_budget(model, **budget)
        return model

    if result.trial.name != "range":
        return {result.trial.name: load()}
    whole, cascade, lowest = load(cost=None), load(), load()
    for gate in gates(lowest).values():
        gate.budget = min(BUDGETS)
    some = batches[: -(-_CHOSEN_ON // len(batches[0][0]))]
    observed = {budget: observe_budget(cascade, some, budget) for budget in BUDGETS}
    found = {f"range, budget {min(BUDGETS):g}": lowest, "range, every gate open": whole}
    with contextlib.suppress(BadValue):  # no budget costs so little
        set_choice(cascade, choose_among(observed, target_cost=TIMED_CASCADE))
        found[f"range, cascade {TIMED_CASCADE:g}"] = cascade
    return found
