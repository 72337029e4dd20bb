"""Fine-tuning from ImageNet weights on CIFAR-10: a static network and its conversion, by the same recipe.

    python train_scripts/experiments/finetuning.py --data path/to/cifar10 --weights efficientnet_lite0/model.safetensors
    python train_scripts/experiments/finetuning.py --data uoft-cs/cifar10 --full        # the published weights; a GPU

64 px, 10,000 of the training images, 4 epochs: an hour and a half on two cores. Writes ``finetuning.csv`` and the like.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from dg_timm.experiments.comparison import write
from dg_timm.experiments.runner import Cell, parse, run
from dg_timm.training.run.arguments import natural

STATIC = "tf_efficientnet_lite0"
TITLES = {"static": STATIC, "dynamic": f"dg_{STATIC}"}


def cells(seeds: Sequence[int], weights: Optional[Path], full: bool) -> list[Cell]:
    options: dict[str, Any] = {"recipe": "cifar10_finetune", "workers": 0}
    options |= {"pretrained": True} if weights is None else {"initial-checkpoint": weights}
    if full:
        options |= {"train-limit": 50000, "image-size": 96, "epochs": 10, "workers": 8}
    return [Cell(name, options | {"model": model}, seed) for seed in seeds for name, model in TITLES.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="safetensors of the static network; by default the published ones")
    parser.add_argument("--seeds", nargs="+", type=natural, default=[0, 1, 2])
    args = parse(parser, "finetuning", "all images at 96 px, 10 epochs")
    if args.weights is not None and not args.weights.is_file():
        raise ValueError(f"--weights {args.weights} is no file")
    results = run(cells(args.seeds, args.weights, args.full), args)
    if not results:
        raise ValueError(f"no cell is finished in {args.results}; run without --collect")
    write(results, TITLES, "static", args.results, "finetuning")
    return 0
