"""Evaluate networks: top-1, top-5 and loss, exact under any number of processes. One JSON line a network.

``--help`` has the options; the code is :mod:`dg_timm.cli.validate`.
"""

from dg_timm.cli.validate import main

if __name__ == "__main__":
    raise SystemExit(main())
