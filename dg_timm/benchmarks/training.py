"""What the training loop costs beside a plain loop, and what memory it holds while it streams.

    python train_scripts/measure_training.py throughput --models tf_efficientnet_lite0 dg_tf_efficientnet_lite0
    python train_scripts/measure_training.py memory --plot results/memory.png

throughput: updates of the trainer and of a hand-written loop take turns (A B A B ...) over one network and one loader.
memory: epochs over streamed webdataset shards (written first, to a temporary folder). The resident memory of the
training process and its workers is read twice a second.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dg_timm._command_line import CommandParser, HelpFormatter
from dg_timm.benchmarks.streaming import measure_memory
from dg_timm.benchmarks.timing import order_of_round
from dg_timm.cli.errors import cli_errors
from dg_timm.cli.train import parse as parse_training
from dg_timm.training.loop.distributed import InterruptFlag, make_accelerator
from dg_timm.training.loop.optimization import split_batch
from dg_timm.training.loop.trainer import Trainer
from dg_timm.training.run.classification import build_classification
from dg_timm.training.run.lifecycle import build_trainer
from dg_timm.training.run.option_types import non_negative_int, positive_int


def measure_throughput(args: argparse.Namespace) -> None:
    """Print a line of JSON for each network: images a second of both loops, and their ratio."""
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--model", name, "--image-size", str(args.image_size), "--batch-size", str(args.batch_size),
                       "--opt", "adamw", "--lr", "1e-4", "--channels-last", "--workers", str(args.workers),
                       "--data", args.data, "--output", f"{folder}/run"]  # fmt: skip
            own, accelerator = parse_training(options), make_accelerator()
            split = split_batch(own.batch_size, accelerator.num_processes, own.micro_batch)
            task = build_classification(own, accelerator, split)
            trainer = build_trainer(own, accelerator, InterruptFlag(), task, split)
        print(json.dumps({"model": name, **compare_loops(trainer, args.rounds, args.updates)}), flush=True)


def compare_loops(trainer: Trainer, rounds: int, updates: int) -> dict[str, Any]:
    """Time the trainer and a plain loop in turn.

    Args:
        trainer: whose network, optimizer and loader both loops use.
        rounds: how often each loop is timed; a round before them warms up.
        updates: of each loop in a round.

    Returns:
        images a second of both (medians), and the ratio with its quartiles.
    """
    steps = _make_loops(trainer)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in order_of_round(steps, number):
            start = time.perf_counter()
            for _ in range(updates):
                steps[name]()
            if number:  # the first round warms up
                rates[name].append(updates * trainer.config.split.images / (time.perf_counter() - start))
    ratios = sorted(a / b for a, b in zip(rates["trainer"], rates["plain"], strict=True))
    return {
        **{f"{name}_images_per_second": round(statistics.median(values), 2) for name, values in rates.items()},
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.75])],
        "rounds": rounds,
        "updates_a_round": updates,
        "threads": torch.get_num_threads(),
    }


def _make_loops(trainer: Trainer) -> dict[str, Callable[[], None]]:
    """One update of the trainer, and of a plain loop over the same network, optimizer and loader."""

    def endless() -> Iterator[Any]:
        for epoch in range(10**6):
            yield from trainer.loader.epoch(epoch)

    batches, device = endless(), trainer.accelerator.device
    model, optimizer = trainer.learner.model.train(), trainer.learner.optimizer
    loss_fn = nn.CrossEntropyLoss()

    def plain() -> None:
        batch = next(batches)
        images = batch.images.to(device, memory_format=torch.channels_last)
        loss = loss_fn(model(images), batch.labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    def own() -> None:
        trainer.update(batches)
        trainer.flush_stats()  # as with --log-every 1: the plain loop looks at its loss each time, too

    return {"trainer": own, "plain": plain}


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return the exit status."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(required=True, title="what to measure")
    first = commands.add_parser("throughput", help="images a second", formatter_class=HelpFormatter)
    first.add_argument(
        "--models",
        nargs="+",
        default=["tf_efficientnet_lite0", "dg_tf_efficientnet_lite0"],
        help="networks to train, one after another",
    )
    first.add_argument("--data", default="digits", help="data set, as for train.py")
    first.add_argument("--image-size", type=positive_int, default=64, help="height and width of the images in pixels")
    first.add_argument("--batch-size", type=positive_int, default=64, help="number of images in an update")
    first.add_argument("--workers", type=non_negative_int, default=0, help="number of decoding processes")
    first.add_argument("--rounds", type=positive_int, default=16, help="number of rounds; each times both loops")
    first.add_argument("--updates", type=positive_int, default=3, help="number of updates of each loop in a round")
    first.set_defaults(run=measure_throughput)
    second = commands.add_parser("memory", help="memory over a stream", formatter_class=HelpFormatter)
    second.add_argument("--images", type=positive_int, default=20000, help="number of images in an epoch")
    second.add_argument("--shards", type=positive_int, default=16, help="number of shards that the images lie in")
    second.add_argument("--epochs", type=positive_int, default=1, help="number of epochs to train")
    second.add_argument("--buffer", type=positive_int, default=1024, help="number of images that are shuffled together")
    second.add_argument("--workers", type=non_negative_int, default=2, help="number of decoding processes")
    second.add_argument("--plot", type=Path, help="PNG file for memory over time; by default none is drawn")
    second.set_defaults(run=measure_memory)
    args = parser.parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
