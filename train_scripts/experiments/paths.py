"""Which paths images take: how much of a dynamic network runs for which images of CIFAR-10.

``--help`` has the options; the code is :mod:`dg_timm.experiments.paths`.
"""

from dg_timm.experiments.paths import main

if __name__ == "__main__":
    raise SystemExit(main())
