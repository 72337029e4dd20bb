"""The options of every run: where it writes, how it goes on, and on what it runs."""

import argparse

from dg_timm.training.run.option_types import OptionGroup, flag, non_negative_int, positive_int


def add_run_options(
    parser: argparse.ArgumentParser,
    *,
    output: str | None = "output/train",
    output_help: str = "folder of the run",
    val_batch_size: int = 64,
) -> None:
    """Add how and where to run; no recipe needs these.

    Args:
        parser: gets the options.
        output: default of ``--output``.
        output_help: help text of ``--output``.
        val_batch_size: what the help of ``--val-batch-size`` says that it is by default.
    """
    run = parser.add_argument_group("run")
    run.add_argument("--recipe", help="YAML file of options, or the name of a recipe of dg_timm; by default none")
    run.add_argument("--output", default=output, help=output_help)
    run.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="go on from a checkpoint: its folder, or auto (also without a value) for the newest sound one; by default "
        "start afresh",
    )
    run.add_argument(
        "--allow-changed",
        nargs="+",
        default=[],
        metavar="OPTION",
        help="names of options that a resumed run may change, e.g. data; by default none",
    )
    run.add_argument("--seed", type=non_negative_int, default=0, help="seed of everything that is drawn")
    _add_speed_options(run)
    run.add_argument(
        "--val-batch-size",
        type=positive_int,
        help=f"number of images that a process evaluates at a time; by default {val_batch_size}",
    )
    run.add_argument(
        "--save-every",
        type=non_negative_int,
        default=0,
        help="number of updates between checkpoints within an epoch; 0 saves after each epoch only",
    )
    run.add_argument("--keep", type=positive_int, default=2, help="newest checkpoints to keep beside the best")
    run.add_argument("--log-every", type=positive_int, default=10, help="number of updates between reports of the loss")
    run.add_argument(
        "--report-to",
        nargs="+",
        default=[],
        metavar="TRACKER",
        help="trackers of Accelerate, e.g. tensorboard, wandb or trackio; by default none",
    )
    run.add_argument("--dry-run", action="store_true", help="print what the run would do, and write nothing")


def add_sharding_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--fsdp``."""
    run = parser.add_argument_group("several processes")
    flag(run, "--fsdp", False, "share the network out over the processes (FSDP2), for one that does not fit in each")


def _add_speed_options(run: OptionGroup) -> None:
    run.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default="no",
        help="precision of autocast; fp16 needs a GPU",
    )
    flag(run, "--channels-last", False, "lay images and weights out with channels last")
    flag(run, "--compile", False, "compile the network with torch.compile")
    flag(run, "--grad-checkpointing", False, "recompute activations in the backward pass instead of keeping them")
    flag(run, "--sync-bn", False, "share BatchNorm statistics between processes in every batch (GPUs)")
    run.add_argument(
        "--dist-bn",
        choices=("reduce", "broadcast"),
        default="reduce",
        help="norm statistics after an epoch: the average over processes, or the main process's",
    )
