"""Time networks of the zoo against their static twins, interleaved in one run.

    python train_scripts/benchmark.py dg_resnet50 dg_regnetx_016
    python train_scripts/benchmark.py --zoo --json results/inference_cpu.json
    python train_scripts/benchmark.py dg_resnet50 --execution sparse --removed 0.5 --batch-size 1

Every dynamic network is the identity conversion of its (randomly initialised) twin and must predict what that predicts
before anything is timed. A round times both, each first in every other round. Prints a Markdown table: medians in
milliseconds an image, the median of the ratios of the rounds, and its quartiles.

``--removed F`` wires every image at random so that a share F of the blocks is removed, other blocks in each image, and
prints the multiply-adds that remain (``dg_timm.cost``) beside the time; sparse execution must then predict what dense
does.
"""

import argparse
import gc
import json
import os
import platform
import time
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Optional

import timm
import torch
from torch import Tensor, nn

import dg_timm
from dg_timm.checkpoint import graph_stages
from dg_timm.cost import relative_cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="for example dg_resnet50")
    parser.add_argument("--zoo", action="store_true", help="every model of the zoo")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--execution", choices=dg_timm.introspect.EXECUTIONS, default="dense")
    parser.add_argument("--removed", type=float, metavar="F", help="share of the blocks to remove for every image")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    names = dg_names(parser, args)
    for option in ("batch_size", "image_size", "rounds", "threads"):
        if getattr(args, option) < (3 if option == "rounds" else 1):
            parser.error(f"--{option.replace('_', '-')} is too small: {getattr(args, option)}")
    if args.removed is not None and not 0 <= args.removed <= 1:
        parser.error(f"--removed is a share from 0 to 1, got {args.removed}")
    torch.set_num_threads(args.threads)

    print(f"| {'model':20} | static ms | dynamic ms | ratio | quartiles |\n|---|---|---|---|---|", flush=True)
    rows = []
    for name in names:
        row = measure(name, args)
        rows.append({"model": name, **row})
        print(
            f"| {name:20} | {row['static_ms']:.2f} | {row['dynamic_ms']:.2f} | {row['ratio']:.3f} "
            f"| {row['low']:.3f} to {row['high']:.3f} |" + (f" {row['cost']:.3f} |" if "cost" in row else ""),
            flush=True,
        )
    if args.json:
        options = f"--execution {args.execution} --batch-size {args.batch_size} --image-size {args.image_size}"
        options += f" --removed {args.removed}" if args.removed is not None else ""
        options += " --channels-last" if args.channels_last else ""
        result = {
            "command": f"train_scripts/benchmark.py {'--zoo' if args.zoo else ' '.join(names)} {options} "
            f"--rounds {args.rounds}",
            "hardware": f"{args.threads} threads on {os.cpu_count()} CPU cores ({platform.machine()}), float32",
            "software": f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, "
            f"dg_timm {dg_timm.__version__}",
            "batch_size": args.batch_size,
            "image_size": args.image_size,
            "rounds": args.rounds,
            "times": rows,
        }
        beside = args.json.with_suffix(".tmp")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(args.json)


def dg_names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    if args.zoo == bool(args.models):
        parser.error("give models, or --zoo")
    zoo = timm.list_models("dg_*")
    unknown = [name for name in args.models if name not in zoo]
    if unknown:
        parser.error(f"{unknown[0]} is not in the zoo; choose from {', '.join(zoo)}")
    return args.models or [f"dg_{variant}" for variant in dg_timm.zoo.VARIANTS]


@torch.inference_mode()
def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds an image of a network and of its static twin."""
    torch.manual_seed(0)
    batch_size, rounds = args.batch_size, args.rounds
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    static = timm.create_model(name.removeprefix("dg_")).eval().to(memory_format=layout)
    weights = dict(state_dict=static.state_dict())
    dynamic = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=weights).eval().to(memory_format=layout)
    images = torch.randn(batch_size, 3, args.image_size, args.image_size).contiguous(memory_format=layout)
    wanted, share = static(images), {}
    if args.removed is not None:
        alphas = random_wiring(dynamic, batch_size, args.removed)
        share["cost"] = round(relative_cost(dynamic, alphas, (3, *images.shape[2:])).mean().item(), 4)
        overrule(dynamic, alphas)
        wanted = dynamic(images)
    dg_timm.set_execution(dynamic, args.execution)
    got = dynamic(images)
    exact = args.removed is None and args.execution == "dense"
    if not (torch.equal(got, wanted) if exact else torch.allclose(got, wanted, 1e-3, 1e-3 * float(wanted.abs().max()))):
        raise RuntimeError(f"{name} does not predict what it should; nothing was timed")
    seconds(static, images), seconds(dynamic, images)  # warm up
    times: dict[str, list[float]] = {"static": [], "dynamic": []}
    for number in range(rounds):
        order = [("static", static), ("dynamic", dynamic)]
        for key, model in order if number % 2 == 0 else reversed(order):
            times[key].append(1000 * seconds(model, images) / batch_size)
    ratios = [b / a for a, b in zip(times["static"], times["dynamic"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    gc.collect()
    return {
        "static_ms": round(median(times["static"]), 2),
        "dynamic_ms": round(median(times["dynamic"]), 2),
        "ratio": round(median(ratios), 3),
        "low": round(low, 3),
        "high": round(high, 3),
        **share,
    }


class FixedWiring(nn.Module):
    """A router that runs as before and is overruled: by rows of the batch, in which a removed node's are 0."""

    def __init__(self, router: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.router, self.rows, self.out_degree = router, rows, rows.shape[1]

    def forward(self, x: Tensor, reached: Optional[Tensor] = None) -> Tensor:
        self.router(x)
        return self.rows if len(x) == len(self.rows) else self.rows[self.rows.any(1)]


def random_wiring(model: nn.Module, batch: int, removed: float) -> dict[str, Tensor]:
    """Adjacency matrices: for every image a chain past a random choice of blocks."""
    alphas = {}
    for name, stage in graph_stages(model).items():
        blocks = len(stage)
        alpha = torch.zeros(batch, blocks + 2, blocks + 2)
        for image in range(batch):
            gone = int(blocks * removed + float(torch.rand(())))  # on average the share, also of three blocks
            kept = sorted((torch.randperm(blocks)[gone:] + 1).tolist())
            nodes = [0, *kept, blocks + 1]
            for source, target in pairwise(nodes):
                alpha[image, source, target] = 1.0
        alphas[name] = alpha
    return alphas


def overrule(model: nn.Module, alphas: dict[str, Tensor]) -> None:
    for name, stage in graph_stages(model).items():
        for node in range(len(stage) + 1):
            router = stage.get_submodule(f"router{node}")
            setattr(stage, f"router{node}", FixedWiring(router, alphas[name][:, node, node + 1 :]))


def seconds(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
