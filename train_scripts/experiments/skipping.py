"""Imagenette from ImageNet weights: gates, a range of budgets, and the fixed networks that gates find, beside static.

``--help`` has the options; the code is :mod:`dg_timm.experiments.skipping`.
"""

from dg_timm.experiments.skipping import main

if __name__ == "__main__":
    raise SystemExit(main())
