"""Time networks of the zoo against their static twins, interleaved in one run.

    python train_scripts/benchmark.py dg_resnet50 dg_regnetx_016
    python train_scripts/benchmark.py --zoo --json results/inference_cpu.json

Every dynamic network is the identity conversion of its (randomly initialised) twin and must predict what that predicts
before anything is timed. A round times both, each first in every other round. Prints a Markdown table: medians in
milliseconds an image, the median of the ratios of the rounds, and its quartiles.
"""

import argparse
import gc
import json
import os
import platform
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch
from torch import Tensor, nn

import dg_timm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="for example dg_resnet50")
    parser.add_argument("--zoo", action="store_true", help="every model of the zoo")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    names = dg_names(parser, args)
    for option in ("batch_size", "image_size", "rounds", "threads"):
        if getattr(args, option) < (3 if option == "rounds" else 1):
            parser.error(f"--{option.replace('_', '-')} is too small: {getattr(args, option)}")
    torch.set_num_threads(args.threads)

    print(f"| {'model':20} | static ms | dynamic ms | ratio | quartiles |\n|---|---|---|---|---|", flush=True)
    rows = []
    for name in names:
        row = measure(name, args.batch_size, args.image_size, args.rounds)
        rows.append({"model": name, **row})
        print(
            f"| {name:20} | {row['static_ms']:.2f} | {row['dynamic_ms']:.2f} | {row['ratio']:.3f} "
            f"| {row['low']:.3f} to {row['high']:.3f} |",
            flush=True,
        )
    if args.json:
        options = f"--batch-size {args.batch_size} --image-size {args.image_size} --rounds {args.rounds}"
        result = {
            "command": f"train_scripts/benchmark.py {'--zoo' if args.zoo else ' '.join(names)} {options}",
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
def measure(name: str, batch_size: int, image_size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds an image of a network and of its static twin."""
    torch.manual_seed(0)
    static = timm.create_model(name.removeprefix("dg_")).eval()
    weights = dict(state_dict=static.state_dict())
    dynamic = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=weights).eval()
    images = torch.randn(batch_size, 3, image_size, image_size)
    if not torch.equal(static(images), dynamic(images)):
        raise RuntimeError(f"{name} does not predict what its static twin predicts; nothing was timed")
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
    }


def seconds(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
