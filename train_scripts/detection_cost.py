"""What a dynamic backbone costs a detector: the paper's Table 2 (GFLOPs at 800 x 1333), and time on the clock.

``--help`` has the options; the code is :mod:`dg_timm.benchmarks.detection`.
"""

from dg_timm.benchmarks.detection import main

if __name__ == "__main__":
    raise SystemExit(main())
