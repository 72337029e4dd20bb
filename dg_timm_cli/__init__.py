"""The command ``dg-timm``: a table of commands, of which only the one that is called is imported.

It lies beside ``dg_timm`` because importing that imports PyTorch, and ``dg-timm --help`` should not wait for it.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple


class Command(NamedTuple):
    """A row of the table.

    Attributes:
        module: has ``main``, which reads ``sys.argv`` and returns the exit status.
        extra: of ``pip install 'dg-timm[...]'`` that it needs; empty for none.
        help: what it does, in a line.
    """

    module: str
    extra: str
    help: str


COMMANDS = {
    "train": Command("dg_timm.cli.train", "train", "train a classifier, or go on with a training"),
    "validate": Command("dg_timm.cli.validate", "train", "measure top-1, top-5 and loss of networks on labeled images"),
    "detect": Command("dg_timm.cli.detect", "detect", "train or evaluate a detector"),
    "calibrate": Command("dg_timm.cli.calibration", "train", "find the threshold for a cost or time"),
    "predict": Command("dg_timm.cli.prediction", "train", "classify images: names, scores, cost and milliseconds"),
    "show": Command("dg_timm.cli.wiring", "plots", "draw the wiring of images"),
    "convert": Command("dg_timm.cli.converting", "", "make a timm model or checkpoint dynamic, and save it"),
    "list": Command("dg_timm.cli.listing", "", "list models with parameters, multiply-adds and tags"),
    "card": Command("dg_timm.cli.cards", "", "print or write the model card of a network"),
    "publish": Command("dg_timm.cli.publish", "", "send a network to the Hugging Face Hub"),
    "benchmark": Command("dg_timm.benchmarks.command", "detect", "time networks beside their static twins"),
    "doctor": Command("dg_timm.cli.diagnosis", "", "check what is installed, and say what to mend"),
}

_CORE = {"torch", "timm", "huggingface_hub", "safetensors", "filelock", "numpy", "jinja2", "yaml", "torchvision", "PIL"}
_USAGE = "usage: dg-timm [--version] [--debug] COMMAND ..."


def overview() -> str:
    """Write the help of ``dg-timm`` itself."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    return f"""{_USAGE}

Dynamic graph networks for timm.

commands:
{rows}

options:
  --version  print the version
  --debug    show the traceback of every error, also after a command
  --help     show this help; after a command, that of the command

examples:
  dg-timm train --recipe digits
  dg-timm predict output/train/model pictures/ --output predictions.csv
  dg-timm show output/train/model picture.png

exit status: 0 done; 1 failed (a defect, which shows its traceback; a loss that is not finite; a check of doctor);
2 a mistake that you can mend, in one line; 128 + n stopped by signal n."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: words after ``dg-timm``; by default those of this process.

    Returns:
        the exit status, as :func:`overview` lists them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in words:
        words.remove("--debug")
        os.environ["DG_TIMM_DEBUG"] = "1"
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"dg-timm {_version()}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        return _refuse(f"there is no command {name!r}; the nearest one is {near!r} (dg-timm --help lists all)")
    try:
        module = importlib.import_module(COMMANDS[name].module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = COMMANDS[name].extra
        if os.environ.get("DG_TIMM_DEBUG") or not extra or missing in _CORE or missing.startswith("dg_timm"):
            raise
        return _refuse(f"dg-timm {name} needs {missing}: pip install 'dg-timm[{extra}]'")
    before, sys.argv = sys.argv, [f"dg-timm {name}", *rest]
    try:
        return int(module.main())
    finally:
        sys.argv = before


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _version() -> str:
    try:
        return metadata.version("dg-timm")
    except metadata.PackageNotFoundError:  # run from a folder, without an installation
        return str(importlib.import_module("dg_timm").__version__)
