"""Train a dynamic graph network and its static network on real images, compare, save, load back, and draw the wiring.

``--help`` has the options; the code is :mod:`dg_timm.cli.quickstart`.
"""

from dg_timm.cli.quickstart import main

if __name__ == "__main__":
    raise SystemExit(main())
