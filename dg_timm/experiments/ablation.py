"""CIFAR-10 from scratch: one network with different topologies and weights (the paper's Tables 4 and 6 in small).

    python train_scripts/experiments/ablation.py --data path/to/cifar10           # 16 px: four hours of one core
    python train_scripts/experiments/ablation.py --data uoft-cs/cifar10 --full    # 32 px, all images: for a GPU

Every variant has the same blocks, recipe, seeds, images and order of images. Writes ``ablation.csv`` (a row for each
trial), ``ablation.md`` and ``ablation.png`` (means, and 95 % intervals of the differences from the static network).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dg_timm._errors import BadState
from dg_timm.cli.errors import cli_errors
from dg_timm.experiments.comparison import write_comparison
from dg_timm.experiments.options import make_parser, parse
from dg_timm.experiments.runner import run_trials
from dg_timm.experiments.trial import Trial
from dg_timm.training.run.option_types import non_negative_int

STATIC = "cifar_resnet26"
SEEDS = (0, 1, 2)
SAME: dict[str, Any] = {"instance_aware": False}  # weights are the same for all images
# title, options of the graph, options of train.py
VARIANTS: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "static": ("static chain", {}, {"model": STATIC}),
    "shallow": ("static chain of half the depth (14 layers)", {}, {"model": "cifar_resnet14"}),
    "alpha_b": ("alpha_b: weights for each image", {}, {}),
    "alpha": ("alpha: learned weights, the same for all images", SAME, {}),
    "alpha_no_shortcut": ("alpha without the blocks' shortcuts", {"block_shortcut": False, **SAME}, {}),
    "no_shortcut": ("alpha_b without the blocks' shortcuts", {"block_shortcut": False}, {}),
    "paper": (
        "alpha_b without shortcuts and edge scales: the paper to the letter",
        {"block_shortcut": False, "edge_scale": False},
        {},
    ),
    "half": ("alpha_b without shortcuts, learned to cost half", {"block_shortcut": False}, {"target-cost": 0.5}),
    "ws": ("WS(4, 0.75), weights the same for all images", {"topology": "ws", **SAME}, {}),
    "ws_b": ("WS(4, 0.75), weights for each image", {"topology": "ws"}, {}),
    "er": ("ER(0.2), weights the same for all images", {"topology": "er", **SAME}, {}),
    "ba": ("BA(5), the same", {"topology": "ba", **SAME}, {}),
    "er_open": ("ER(0.2), and no threshold learns", {"topology": "er", **SAME}, {"fix-thresholds": True}),
    "ba_open": ("BA(5), and no threshold learns", {"topology": "ba", **SAME}, {"fix-thresholds": True}),
}


def trials(seeds: Sequence[int], names: Sequence[str], recipe: str) -> list[Trial]:
    """List the trials seed by seed: an experiment that is interrupted has all variants of the seeds that are done."""
    found = []
    for seed in seeds:
        for name in names:
            _, graph, more = VARIANTS[name]
            kwargs = {**graph, "topology_seed": seed} if "topology" in graph else dict(graph)
            options: dict[str, Any] = {
                "recipe": recipe,
                "model": STATIC if name == "static" else f"dg_{STATIC}",
                **more,
            }
            found.append(Trial(name, options | ({"model-kwargs": kwargs} if kwargs else {}), seed))
    return found


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=non_negative_int, default=list(SEEDS), help="seeds of every variant")
    parser.add_argument(
        "--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="variants to train; by default all"
    )
    args = parse(parser, "ablation", "the recipe cifar10_full in place of cifar10_scratch", argv)
    torch.set_num_threads(1)
    recipe = "cifar10_full" if args.full else "cifar10_scratch"
    run_trials(trials(args.seeds, args.only, recipe), args)
    args.collect = True  # the table is of everything that is kept
    results = run_trials(trials(sorted({*SEEDS, *args.seeds}), list(VARIANTS), recipe), args)
    if not results:
        raise BadState(f"no trial is finished in {args.results}; run without --collect")
    write_comparison(
        results, {name: title for name, (title, *_) in VARIANTS.items()}, "static", args.results, "ablation"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
