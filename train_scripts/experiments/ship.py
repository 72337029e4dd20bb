"""Make the folder of the network that ships with the package, from the trials and the table of budgets.py.

``--help`` has the options; the code is :mod:`dg_timm.experiments.ship`.
"""

from dg_timm.experiments.ship import main

if __name__ == "__main__":
    raise SystemExit(main())
