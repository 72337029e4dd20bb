"""CIFAR-10 from scratch: one network with different topologies and weights (the paper's Tables 4 and 6 in small).

``--help`` has the options; the code is :mod:`dg_timm.experiments.ablation`.
"""

from dg_timm.experiments.ablation import main

if __name__ == "__main__":
    raise SystemExit(main())
