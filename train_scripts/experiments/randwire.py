"""Parameters and multiply-adds of the networks of the paper's Table 4, beside its figures.

``--help`` has the options; the code is :mod:`dg_timm.experiments.randwire_cost`.
"""

from dg_timm.experiments.randwire_cost import main

if __name__ == "__main__":
    raise SystemExit(main())
