"""Fine-tuning from ImageNet weights on CIFAR-10: a static network and its conversion, by the same recipe.

    python train_scripts/experiments/finetuning.py --data path/to/cifar10 --weights efficientnet_lite0/model.safetensors
    python train_scripts/experiments/finetuning.py --data uoft-cs/cifar10 --full        # the published weights; a GPU

64 px, 10,000 of the training images, 4 epochs: an hour and a half on two cores. Writes ``finetuning.csv``,
``finetuning.md`` and ``finetuning.png``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dg_timm._errors import BadState, BadValue
from dg_timm.cli.errors import cli_errors
from dg_timm.experiments.comparison import write_comparison
from dg_timm.experiments.options import make_parser, parse
from dg_timm.experiments.runner import run_trials
from dg_timm.experiments.trial import Trial
from dg_timm.training.run.option_types import non_negative_int

STATIC = "tf_efficientnet_lite0"
TITLES = {"static": STATIC, "dynamic": f"dg_{STATIC}"}
_FULL_SIZE = {"train-limit": 50000, "image-size": 96, "epochs": 10, "workers": 8}


def trials(seeds: Sequence[int], weights: Path | None, full: bool) -> list[Trial]:
    """List the trials: both networks for every seed, from a weights file or the published weights."""
    options: dict[str, Any] = {"recipe": "cifar10_finetune", "workers": 0}
    options |= {"pretrained": True} if weights is None else {"initial-checkpoint": weights}
    options |= _FULL_SIZE if full else {}
    return [Trial(name, options | {"model": model}, seed) for seed in seeds for name, model in TITLES.items()]


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--weights", type=Path, help="safetensors file of the static network; by default the published weights"
    )
    parser.add_argument("--seeds", nargs="+", type=non_negative_int, default=[0, 1, 2], help="seeds of both networks")
    args = parse(parser, "finetuning", "all images at 96 px, 10 epochs", argv)
    torch.set_num_threads(1)
    if args.weights is not None and not args.weights.is_file():
        raise BadValue(f"--weights {args.weights}: there is no such file")
    results = run_trials(trials(args.seeds, args.weights, args.full), args)
    if not results:
        raise BadState(f"no trial is finished in {args.results}; run without --collect")
    write_comparison(results, TITLES, "static", args.results, "finetuning")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
