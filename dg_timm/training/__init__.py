"""Training and evaluation through Accelerate: what the scripts in train_scripts share.

Nothing here is needed to use a network; it wants the extra, ``pip install 'dg-timm[train]'``. Imports point up
this list::

    sources        data sets: the Hub, folders, Parquet, webdataset shards, digits
    loading        which rows form a batch, and what an image becomes
    metrics        evaluate.Metric classes
    models         the network to train, its teacher, what of it is frozen
    optimization   batch arithmetic, parameter groups, optimizer, schedule
    objective      loss of a batch: mixup, smoothing, distillation
    processes      Accelerate, agreement between processes, signals
    evaluation     exact figures under any number of processes
    checkpoints    written aside, verified, rotated
    report         what a run leaves to read: lines, tables, curves, trackers
    trainer        the loop
    arguments      options, recipes, which of them a resumed run must share
    setup          from options to data, network and optimizer
    run            from options to an end: start, resume, stop, messages
    dry_run        what a run would do
"""
