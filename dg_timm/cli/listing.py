"""List models: parameters and multiply-adds in millions, image size, and tags of published weights.

    dg-timm list
    dg-timm list '*resnet*' --most-params 30 --json
    dg-timm list 'regnet*' --static

Every edge is open where multiply-adds are counted. A dg_ before any other timm model that dg_timm.dynamize takes works
as well, though it is not listed.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs

from dg_timm._command_line import CommandParser
from dg_timm._errors import BadValue
from dg_timm.analysis.counting import complexity
from dg_timm.cli.errors import cli_errors
from dg_timm.models.registry import STATIC_MODELS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "patterns", nargs="*", default=["*"], metavar="PATTERN", help="names, with * and ? as wildcards"
    )
    parser.add_argument("--static", action="store_true", help="list the static networks of timm instead")
    parser.add_argument("--most-params", type=float, metavar="M", help="most millions of parameters; by default any")
    parser.add_argument("--most-macs", type=float, metavar="M", help="most millions of multiply-adds; by default any")
    parser.add_argument("--tag", help="part of the tag of published weights, e.g. in1k; by default any or none")
    parser.add_argument("--names", action="store_true", help="print names alone, which is quick")
    parser.add_argument("--json", action="store_true", help="print JSON lines in place of a table")
    return parser.parse_args(argv)


def find_names(patterns: Sequence[str], static: bool) -> list[str]:
    """List the names of the zoo, or of timm, that match one of the patterns.

    Raises:
        BadValue: if there is none.
    """
    known = set(timm.list_models(exclude_filters="dg_*")) if static else {f"dg_{name}" for name in STATIC_MODELS}
    wanted = list(patterns) if static else [*patterns, *(f"dg_{text}" for text in patterns if text[:1] != "*")]
    found = [name for name in timm.list_models(wanted) if name in known]
    if not found:
        listed = "timm" if static else "the zoo (--static lists timm's models)"
        words = [text.strip("*?").removeprefix("dg_") for text in patterns]
        bare = {name.removeprefix("dg_"): name for name in sorted(known)}
        near = [bare[key] for word in words for key in difflib.get_close_matches(word, bare, n=3, cutoff=0.5)]
        hint = f"; the nearest: {', '.join(near)}" if near else ""
        raise BadValue(f"no model of {listed} matches {' '.join(patterns)}{hint}")
    return found


def describe(name: str) -> dict[str, Any]:
    """Count a network without making its weights; name the tags of those that are published."""
    tags = [key.partition(".")[2] for key, cfg in get_arch_pretrained_cfgs(name).items() if cfg.has_weights]
    model: Any = timm.create_model(name, device="meta")
    counts, size = complexity(model), model.pretrained_cfg["input_size"]
    return dict(model=name, params=counts.params, multiply_adds=counts.multiply_adds, image_size=size[-1], tags=tags)


def _is_wanted(row: dict[str, Any], args: argparse.Namespace) -> bool:
    within = all(
        most is None or row[key] <= most * 1e6
        for key, most in (("params", args.most_params), ("multiply_adds", args.most_macs))
    )
    return within and (args.tag is None or any(args.tag in tag for tag in row["tags"]))


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """List; return the exit status."""
    args = parse(argv)
    names = find_names(args.patterns, args.static)
    if args.names:
        print("\n".join(names))
        return 0
    width = max(map(len, names))
    if not args.json:
        print(f"{'model':{width}} {'params (M)':>10} {'MACs (M)':>9} {'px':>4}  tags")
    shown = 0
    for name in names:
        row = describe(name)
        if not _is_wanted(row, args):
            continue
        shown += 1
        counts = f"{row['params'] / 1e6:10.3f} {row['multiply_adds'] / 1e6:9.1f} {row['image_size']:4}"
        print(json.dumps(row) if args.json else f"{name:{width}} {counts}  {', '.join(row['tags'])}", flush=True)
    if not shown:
        print("no model is within these bounds", file=sys.stderr)
    return 0
