import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cell, add_options, run


def static(depth, seed=0, **options):
    first = Cell(
        f"cifar_resnet{depth}-16px", {"recipe": "cifar10_16px", "model": f"cifar_resnet{depth}", **options}, seed
    )
    return first, Cell(
        f"cifar_resnet{depth}", {"recipe": "cifar10_32px", "model": f"cifar_resnet{depth}", **options}, seed, first
    )


parser = argparse.ArgumentParser()
add_options(parser, "output/budgets")
parser.add_argument("--depths", nargs="+", default=["26"])
args = parser.parse_args()
run([c for d in args.depths for c in static(d)], args)
