"""Table 6 and Table 4 in small: CIFAR-10 from scratch, the same network wired in different ways.

    python train_scripts/experiments/ablation.py --data path/to/cifar10            # 16 px, two cores: four hours
    python train_scripts/experiments/ablation.py --data uoft-cs/cifar10 --full     # 32 px, 100 epochs: a GPU

Writes ``ablation.csv`` (a row a cell) and ``ablation.md`` (means, and 95 % intervals of the differences from static).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cell, add_options, run, write_csv

STATIC = "cifar_resnet26"
VARIANTS = {  # options of the network, with the name of the row
    "static": None,
    "alpha_b": {},
    "alpha": {"instance_aware": False},
    "alpha_b, no shortcuts": {"block_shortcut": False},
    "the paper to the letter": {"block_shortcut": False, "edge_scale": False},
    "ER(0.2)": {"wiring": "er", "instance_aware": False},
    "BA(5)": {"wiring": "ba", "instance_aware": False},
    "WS(4, 0.75)": {"wiring": "ws", "instance_aware": False},
}


def cells(seeds: int) -> list[Cell]:
    """Seed by seed, so that what is interrupted has all variants of the seeds that are done."""
    return [
        Cell(
            name.replace(", ", "-").replace(" ", "_"),
            {"recipe": "cifar10_scratch", "model": STATIC if kwargs is None else f"dg_{STATIC}"}
            | ({"model-kwargs": kwargs} if kwargs else {}),
            seed,
        )
        for seed in range(seeds)
        for name, kwargs in VARIANTS.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "output/ablation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS))
    args = parser.parse_args()
    wanted = [c for c in cells(args.seeds) if c.name in {n.replace(", ", "-").replace(" ", "_") for n in args.only}]
    rows = [{"cell": c.name, "seed": c.seed, **r["figures"]} for c, r in run(wanted, args)]
    write_csv((args.results or args.output) / "ablation.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
