"""Parameters and multiply-adds of the zoo, against the paper's Table 1.

``--help`` has the options; the code is :mod:`dg_timm.benchmarks.table1`.
"""

from dg_timm.benchmarks.table1 import main

if __name__ == "__main__":
    raise SystemExit(main())
