"""Detection over any timm or dg_timm backbone: data, detectors, their loss and evaluation, and runs.

Nothing here is needed to use a network; it wants the extra ``pip install 'dg-timm[detect]'``. The training loop, its
checkpoints, the average of the weights and reports are those of :mod:`dg_timm.training`.
"""
