"""Detection over any timm or dg_timm backbone: what train_scripts/detect.py is made of.

Nothing here is needed to use a network; it wants the extra, ``pip install 'dg-timm[detect]'``. The loop, checkpoints,
average of the weights and reports are those of :mod:`dg_timm.training`. Imports point up this list::

    digits         pages of handwritten digits, to try things on
    boxes          images and their boxes; every box is checked
    coco           COCO annotation files
    tables         detection data sets of the Hub
    annotations    both splits of any of them
    loading        what an image and its boxes become, and batches of them
    detectors      torchvision's detectors over a feature pyramid; made, saved, loaded, frozen
    objective      loss of a batch
    evaluation     COCO's average precision under any number of processes
    pictures       predictions beside the truth, with the wiring of the image
    arguments      options
"""
