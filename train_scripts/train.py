"""Train any timm or dg_timm network through Accelerate.

``--help`` has the options; the code is :mod:`dg_timm.cli.train`.
"""

from dg_timm.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
