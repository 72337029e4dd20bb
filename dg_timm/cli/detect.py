"""Train a detector over any timm or dg_timm backbone through Accelerate, and evaluate it.

    dg-timm detect --recipe digits                        # minutes on two cores
    dg-timm detect --recipe bccd --data path/to/bccd --initial-checkpoint weights.safetensors
    torchrun --nproc_per_node 8 train_scripts/detect.py --recipe coco_1x --data path/to/coco --model dg_resnet50
    dg-timm detect --evaluate output/detect/model --data path/to/bccd --val-split test --output output/t
    dg-timm detect --recipe bccd ... --resume auto        # go on after any interruption

The detector is torchvision's Faster R-CNN, RetinaNet or FCOS (--detector) with a feature pyramid. Data are COCO
annotation files beside images, or a data set with a column of objects. The options of the recipe come first; the
command line overrides them.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator

from dg_timm._command_line import CommandParser
from dg_timm.cli.errors import cli_errors
from dg_timm.detection import config
from dg_timm.detection.run.build import VAL_BATCH
from dg_timm.detection.run.dry import dry_run_detector, summarize_detection_data
from dg_timm.detection.run.results import RESULT_FILES
from dg_timm.detection.run.saved import evaluate_saved
from dg_timm.detection.run.task import build_detection_task
from dg_timm.training.loop.distributed import InterruptFlag
from dg_timm.training.loop.optimization import split_batch
from dg_timm.training.run import data_options, run_options, training_options
from dg_timm.training.run.lifecycle import RUN_FILES, run_command, run_training
from dg_timm.training.run.recipes import FREE_OPTIONS, parse_with_recipe

RECIPES = Path(__file__).parents[1] / "recipes" / "detection"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options of the recipe and the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    run_options.add_run_options(
        parser,
        output=None,
        output_help="folder of the run; by default output/detect, and with --evaluate nothing is written",
        val_batch_size=VAL_BATCH,
    )
    config.add_data_options(parser)
    data_options.add_summary_option(parser)
    config.add_augmentation_options(parser)
    config.add_detector_options(parser)
    training_options.add_optimization_options(parser)
    training_options.add_cost_options(parser.add_argument_group("cost"))
    config.add_result_options(parser)
    args = parse_with_recipe(parser, argv, RECIPES)
    if args.output is None and args.evaluate is None:
        args.output = "output/detect"
    return args


@cli_errors
def main() -> int:
    """Train, evaluate or plan as the command line says; the exit status."""
    args = parse()
    data_options.require_data(args)

    def work(accelerator: Accelerator, stop: InterruptFlag) -> None:
        if args.evaluate is not None:
            evaluate_saved(args, accelerator, stop)
            return
        if args.data_summary is not None:
            if accelerator.is_main_process:
                summarize_detection_data(args, accelerator)
            return
        split = split_batch(args.batch_size, accelerator.num_processes, args.micro_batch)
        if not args.dry_run:
            run_training(
                args,
                accelerator,
                stop,
                split,
                build_detection_task,
                free_options=FREE_OPTIONS | config.SHOWN_OPTIONS,
                files=(*RUN_FILES, *RESULT_FILES),
            )
        elif accelerator.is_main_process:
            dry_run_detector(args, accelerator, split)

    return run_command(args, work)
