"""One network, many budgets: what every threshold costs and predicts, and the one that meets a budget.

``--help`` has the options; the code is :mod:`dg_timm.cli.calibration`.
"""

from dg_timm.cli.calibration import main

if __name__ == "__main__":
    raise SystemExit(main())
