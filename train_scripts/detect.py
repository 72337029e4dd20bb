"""Train a detector over any timm or dg_timm backbone through Accelerate, and evaluate it.

``--help`` has the options; the code is :mod:`dg_timm.cli.detect`.
"""

from dg_timm.cli.detect import main

if __name__ == "__main__":
    raise SystemExit(main())
