import argparse
import sys

from cells import Cell, add_options, run

MODELS = ("dg_cifar_resnet26", "cifar_resnet26", "cifar_resnet20", "cifar_resnet14", "cifar_resnet8")


def cells(models: list[str], target: float, seed: int = 0) -> list[Cell]:
    found = []
    for model in models:
        small = Cell(f"{model}-16px", {"recipe": "cifar10_16px", "model": model}, seed)
        dynamic = {"target-cost": target, "cost-weight": 30} if model.startswith("dg_") else {}
        found += [small, Cell(model, {"recipe": "cifar10_32px", "model": model, **dynamic}, seed, small)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "budgets")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--target-cost", type=float, default=0.45)
    args = parser.parse_args()
    run(cells(args.only, args.target_cost), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
