"""Train any timm or dg_timm network through Accelerate.

    dg-timm train --recipe digits                         # two minutes on two cores
    dg-timm train --recipe cifar10_finetune --data path/to/cifar10 --pretrained
    torchrun --nproc_per_node 2 train_scripts/train.py --recipe digits    # several processes, on CPUs or GPUs
    accelerate launch train_scripts/train.py --recipe imagenet_resnet --model dg_resnet50 --mixed-precision bf16
    dg-timm train --recipe imagenet_resnet --dry-run      # what it would do
    dg-timm train --recipe digits --resume auto           # go on after any interruption

A recipe (a YAML file, or the name of one in dg_timm/recipes) sets options; the command line overrides them. The batch
size is that of an update over all processes, so a recipe means the same on one device or many.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator

from dg_timm._command_line import CommandParser
from dg_timm.cli.errors import cli_errors
from dg_timm.training.loop.distributed import InterruptFlag
from dg_timm.training.loop.optimization import split_batch
from dg_timm.training.run import data_options, run_options, training_options
from dg_timm.training.run.classification import build_classification
from dg_timm.training.run.lifecycle import run_command, run_training
from dg_timm.training.run.preview import dry_run, summarize_data
from dg_timm.training.run.recipes import parse_with_recipe
from dg_timm.training.run.targets import compiles_whole

RECIPES = Path(__file__).parents[1] / "recipes"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options of the recipe and the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    run_options.add_run_options(parser)
    run_options.add_sharding_option(parser)
    data_options.add_data_options(parser)
    data_options.add_task_options(parser, "single")
    data_options.add_summary_option(parser)
    data_options.add_image_options(parser)
    data_options.add_augmentation_options(parser)
    training_options.add_model_options(parser)
    training_options.add_optimization_options(parser)
    training_options.add_objective_options(parser)
    args = parse_with_recipe(parser, argv, RECIPES, {"--target-cost": training_options.COST_DEFAULTS})
    args.loss = data_options.labeling_of_options(args).loss
    return args


@cli_errors
def main() -> int:
    """Train, or say what would be done; return the exit status."""
    args = parse()
    data_options.require_data(args)

    def work(accelerator: Accelerator, interrupt: InterruptFlag) -> None:
        if args.data_summary is not None:
            if accelerator.is_main_process:
                summarize_data(args)
        elif not args.dry_run:
            split = split_batch(args.batch_size, accelerator.num_processes, args.micro_batch)
            run_training(args, accelerator, interrupt, split, build_classification)
        elif accelerator.is_main_process:
            dry_run(args, accelerator)

    return run_command(args, work, compile=compiles_whole(args))


if __name__ == "__main__":
    raise SystemExit(main())
