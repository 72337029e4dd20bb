"""Accuracy, cost and measured time on CIFAR-10: a network that learned to close, shallower static ones, skipped blocks.

``--help`` has the options; the code is :mod:`dg_timm.experiments.budgets`.
"""

from dg_timm.experiments.budgets import main

if __name__ == "__main__":
    raise SystemExit(main())
