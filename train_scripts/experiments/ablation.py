"""CIFAR-10 from scratch: one network, wired in different ways (the paper's Tables 4 and 6 in small).

    python train_scripts/experiments/ablation.py --data path/to/cifar10           # 16 px: four hours on two cores
    python train_scripts/experiments/ablation.py --data uoft-cs/cifar10 --full    # 32 px, 100 epochs: for a GPU

Every wiring has the same blocks, recipe, seeds, images and order of images. Writes ``ablation.csv`` (a row a cell),
``ablation.md`` and ``ablation.png`` (means, and 95 % intervals of the differences from the static network).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cells import Cell, add_options, run
from comparison import write

STATIC = "cifar_resnet26"
VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {  # title, options of the dynamic network
    "static": ("static chain", {}),
    "alpha_b": ("alpha_b: weights for each image", {}),
    "alpha": ("alpha: learned weights, the same for all images", {"instance_aware": False}),
    "no_shortcut": ("alpha_b without the blocks' shortcuts", {"block_shortcut": False}),
    "paper": ("... and without edge scales: the paper to the letter", {"block_shortcut": False, "edge_scale": False}),
    "ws": ("WS(4, 0.75), weights the same for all images", {"wiring": "ws", "instance_aware": False}),
    "er": ("ER(0.2), the same", {"wiring": "er", "instance_aware": False}),
    "ba": ("BA(5), the same", {"wiring": "ba", "instance_aware": False}),
    "er_open": ("ER(0.2), no threshold learns", {"wiring": "er", "instance_aware": False}),
    "ba_open": ("BA(5), no threshold learns", {"wiring": "ba", "instance_aware": False}),
    "ws_b": ("WS(4, 0.75), weights for each image", {"wiring": "ws"}),
}


def cells(seeds: Sequence[int], names: Sequence[str], recipe: str) -> list[Cell]:
    """Seed by seed: what is interrupted has all variants of the seeds that are done."""
    found = []
    for seed in seeds:
        for name in names:
            kwargs = dict(VARIANTS[name][1])
            if "wiring" in kwargs:
                kwargs["wiring_seed"] = seed
            options: dict[str, Any] = {"recipe": recipe, "model": STATIC if name == "static" else f"dg_{STATIC}"}
            options |= {"fix-thresholds": True} if name.endswith("_open") else {}
            found.append(Cell(name, options | ({"model-kwargs": kwargs} if kwargs else {}), seed))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "ablation")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--full", action="store_true", help="the recipe cifar10_full in place of cifar10_scratch")
    args = parser.parse_args()
    results = run(cells(args.seeds, args.only, "cifar10_full" if args.full else "cifar10_scratch"), args)
    if not results:
        print("no cell is finished")
        return 1
    write(results, {name: title for name, (title, _) in VARIANTS.items()}, "static", args.results, "ablation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
