"""Time networks beside each other: static and dynamic, in one run, each in its turn.

``--help`` has the options; the code is :mod:`dg_timm.benchmarks.command`.
"""

from dg_timm.benchmarks.command import main

if __name__ == "__main__":
    raise SystemExit(main())
