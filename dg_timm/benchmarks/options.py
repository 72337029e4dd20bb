"""The command line of benchmark.py: its options, and which of them exclude each other."""

import argparse
import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch

import dg_timm
from dg_timm._command_line import CommandParser
from dg_timm._errors import BadValue, MissingPackage
from dg_timm.benchmarks.candidates import is_dynamic, split_spec
from dg_timm.benchmarks.setting import DTYPES, EDGES, LAYOUTS, MODES, Setting
from dg_timm.execution.settings import EXECUTIONS
from dg_timm.training.run import networks
from dg_timm.training.run.option_types import fraction, positive_int

_MOST_THREADS_A_CORE = 16


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Read the command line (by default that of this process).

    Raises:
        BadValue: for options that exclude each other.
        MissingPackage: if a plot is asked for and can't be drawn.
    """
    parser = CommandParser(description=description)
    parser.add_argument(
        "models", nargs="*", type=model_spec, metavar="MODEL[:EXECUTION]", help="networks, e.g. dg_resnet50:sparse"
    )
    parser.add_argument("--zoo", action="store_true", help="take every model of the zoo, one after another")
    _add_setting_options(parser)
    parser.add_argument("--threads", type=_threads, default=os.cpu_count() or 1, help="number of CPU threads")
    parser.add_argument(
        "--rounds", type=_at_least(3), default=15, help="number of rounds; each runs every network once"
    )
    kind = parser.add_argument_group("what to measure (by default time)").add_mutually_exclusive_group()
    kind.add_argument(
        "--sweep", action="store_true", help="time sparse execution with 0 to 90 %% of the blocks removed"
    )
    kind.add_argument("--memory", action="store_true", help="measure peak memory, each network in its own process")
    kind.add_argument("--aggregation", action="store_true", help="time aggregation alone, beside a copy")
    parser.add_argument("--json", type=_file(".json"), help="JSON file for the results; by default none is written")
    parser.add_argument(
        "--plot",
        type=_file(".png", ".pdf", ".svg"),
        help="file for a picture of the results; by default none is drawn (needs dg-timm[plots])",
    )
    args = parser.parse_args(argv)
    check_combination(args)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage("--plot needs matplotlib: pip install 'dg-timm[plots]'")
    return args


def _add_setting_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("setting (every combination of several values is measured)")
    group.add_argument(
        "--mode", nargs="+", choices=MODES, default=["inference"], help="inference, or training: an update of SGD"
    )
    group.add_argument("--batch-size", type=positive_int, nargs="+", default=[8], help="number of images in a batch")
    group.add_argument(
        "--image-size", type=_at_least(32), nargs="+", default=[224], help="height and width of the images in pixels"
    )
    group.add_argument("--layout", nargs="+", choices=tuple(LAYOUTS), default=["nchw"], help="memory layout of images")
    group.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["float32"], help="type for autocast")
    group.add_argument("--compile", action="store_true", help="run torch.compile on every network")
    group.add_argument("--device", type=_device, default="cpu", help="device: cpu, cuda, cuda:1 ...")
    group.add_argument(
        "--edges",
        choices=EDGES,
        default="open",
        help="weights of the edges: all open, or those of the identity conversion",
    )
    group.add_argument(
        "--removed",
        type=fraction,
        metavar="SHARE",
        help="remove this share of the blocks, at random for every image; by default none",
    )


def check_combination(args: argparse.Namespace) -> None:
    """Raise BadValue for options that exclude each other."""
    if args.zoo == bool(args.models):
        raise BadValue("give models, or --zoo")
    dynamic = [spec for spec in args.models if is_dynamic(spec)]
    if args.aggregation and not dynamic and not args.zoo:
        raise BadValue("--aggregation needs a dg_ model: a static one aggregates nothing")
    if args.memory and args.removed is not None:
        raise BadValue("--removed is about time; --memory does not take it")
    if (args.removed is not None or args.sweep) and "training" in args.mode:
        raise BadValue("--removed and --sweep are for inference: the paths are imposed, not trained")
    for spec in args.models:
        name, execution = split_spec(spec)
        if execution == "sparse" and "training" in args.mode:
            raise BadValue(f"{spec!r}: sparse execution is for inference, and --mode says training")
        if args.sweep and (spec not in dynamic or execution not in ("", "sparse")):
            raise BadValue(f"{spec!r}: --sweep is for dg_ models in sparse execution")
        if args.removed is not None and spec in dynamic and execution not in ("sparse", "fixed"):
            raise BadValue(f"{spec!r}: dense execution runs what --removed removes; say {name}:sparse or {name}:fixed")


def specs_of(args: argparse.Namespace) -> list[str]:
    """List the networks with their executions."""
    names = list(args.models) or [f"dg_{name}" for name in dg_timm.models.STATIC_MODELS]
    return [f"{name}:sparse" if args.sweep and ":" not in name else name for name in names]


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """List every combination of what several values were given for."""
    product = itertools.product(args.mode, args.batch_size, args.image_size, args.layout, args.dtype)
    return [Setting(*chosen, args.compile, args.device, args.edges, args.removed) for chosen in product]


def model_spec(text: str) -> str:
    """Read the name of a network of timm or the zoo, or a folder, with an execution after a colon."""
    name, execution = split_spec(text)
    head, _, tail = text.partition(":")
    try:
        if (timm.is_model(head) and tail != execution) or (execution and not is_dynamic(text)):
            raise BadValue(f"{text!r}: the execution of a dg_ model is one of {', '.join(EXECUTIONS)}")
        networks.implies_pretrained(name)  # refuses an unknown name
    except BadValue as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = positive_int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return read


def _threads(text: str) -> int:
    value, cores = positive_int(text), os.cpu_count() or 1
    if value > _MOST_THREADS_A_CORE * cores:
        raise argparse.ArgumentTypeError(f"{text} threads are too many for {cores} cores")
    return value


def _device(text: str) -> str:
    try:
        if torch.device(text).type not in ("cpu", "cuda"):
            raise argparse.ArgumentTypeError(f"the device is cpu or cuda, got {text}")
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} can't be used: {str(error).splitlines()[0]}") from error
    return text


def _file(*endings: str) -> Callable[[str], Path]:
    def read(text: str) -> Path:
        path = Path(text)
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write {path.name} to")
        if path.suffix not in endings or path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} must be a file that ends with {' or '.join(endings)}")
        return path

    return read
