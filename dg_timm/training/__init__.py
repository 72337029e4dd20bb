"""Training and evaluation through Accelerate.

Nothing here is needed to use a network; it wants the extra ``pip install 'dg-timm[train]'``. There are three rooms, and
each may use those before it:

- :mod:`dg_timm.training.data`: which rows form a batch, and what an image becomes;
- :mod:`dg_timm.training.loop`: updates of the weights, losses, evaluation, checkpoints and reports, for any task;
- :mod:`dg_timm.training.run`: from options and recipes to a run and its end, and what the command lines share.
"""
