"""Fine-tuning from ImageNet weights on CIFAR-10: a static network and its conversion, by the same recipe.

``--help`` has the options; the code is :mod:`dg_timm.experiments.finetuning`.
"""

from dg_timm.experiments.finetuning import main

if __name__ == "__main__":
    raise SystemExit(main())
