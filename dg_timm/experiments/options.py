"""The command line that all experiments share."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

import dg_timm
from dg_timm._command_line import CommandParser
from dg_timm.training.run.option_types import positive_int

_PACKAGE = Path(dg_timm.__file__).parent


def results_folder(package: Path = _PACKAGE) -> Path:
    """Find where results are kept: ``results/experiments`` of the repository that the package lies in.

    For an installed package it is that of the repository around the current directory, or else of that directory.
    """
    checkout = package.parent
    if not (checkout / "train_scripts").is_dir():
        here = Path.cwd()
        checkout = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)
    return checkout / "results" / "experiments"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Make the parser of an experiment; :func:`parse` adds the options that all of them share."""
    return CommandParser(description=description)


def parse(
    parser: argparse.ArgumentParser, name: str, full: str, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read the command line of an experiment.

    Args:
        parser: with the experiment's own options.
        name: of the experiment, and of its folders.
        full: what ``--full`` does, for its help.
        argv: words of the command line; by default those of this process.
    """
    results = results_folder()
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder with it as Parquet files, or uoft-cs/cifar10")
    parser.add_argument("--full", action="store_true", help=f"run at full size, in folders of its own: {full}")
    parser.add_argument("--output", type=Path, help=f"folder of the runs; by default output/{name}, or {name}_full")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"folder of the results that are kept; by default results/{results.name}/{name}, or {name}_full",
    )
    parser.add_argument(
        "--jobs", type=positive_int, default=os.cpu_count() or 1, help="number of trials that run side by side"
    )
    parser.add_argument("--collect", action="store_true", help="train nothing, and read the trials that are finished")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="options of train.py in place of those of every trial, e.g. epochs=1; by default none",
    )
    args = parser.parse_args(argv)
    for text in args.set:
        if not re.fullmatch(r"[a-z][a-z-]*=.*", text):
            parser.error(f"--set {text}: give OPTION=VALUE, such as epochs=1")
    seeds = getattr(args, "seeds", [])
    if len(set(seeds)) < len(seeds):
        parser.error(f"--seeds {' '.join(map(str, seeds))}: a seed is given twice")
    folder = f"{name}_full" if args.full else name
    args.output = args.output or Path("output") / folder
    args.results = args.results or results / folder
    for given in (args.output, args.results):
        if given.exists() and not given.is_dir():
            parser.error(f"{given} is not a folder")
    return args
