"""CIFAR-10 from scratch: one network, wired in different ways (the paper's Tables 4 and 6 in small).

``--help`` has the options; the code is :mod:`dg_timm.experiments.ablation`.
"""

from dg_timm.experiments.ablation import main
from dg_timm.experiments.runner import guarded

if __name__ == "__main__":
    raise SystemExit(guarded(main))
