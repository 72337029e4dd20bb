"""Time networks beside each other: static and dynamic, in one run, each in its turn.

``--help`` has the options; the code is :mod:`dg_timm.benchmarks.main`.
"""

from dg_timm.benchmarks.main import main

if __name__ == "__main__":
    raise SystemExit(main())
