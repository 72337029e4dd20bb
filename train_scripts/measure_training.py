"""What the training loop costs, beside a plain loop, and what memory it holds while it streams.

``--help`` has the options; the code is :mod:`dg_timm.benchmarks.training`.
"""

from dg_timm.benchmarks.training import main

if __name__ == "__main__":
    raise SystemExit(main())
