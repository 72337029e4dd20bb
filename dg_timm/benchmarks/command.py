"""Time networks beside each other: static and dynamic, in one run, each in its turn.

    dg-timm benchmark dg_resnet50 --batch-size 8 32 --layout nchw channels_last --mode training
    dg-timm benchmark dg_resnet50:sparse --removed 0.5 --batch-size 1 8 32
    dg-timm benchmark dg_resnet50 --sweep --plot results/sparse.png
    dg-timm benchmark dg_resnet50 --memory --mode training
    dg-timm benchmark dg_resnet50 dg_resnet101 --aggregation
    dg-timm benchmark --zoo --edges identity --json results/inference_cpu.json

A model is a name of timm's or of the zoo, with the execution after a colon (``dg_resnet50:sparse``; dense without). The
static network of every dynamic one takes part, and ratios are against it. A round runs every model once, in an order
that turns round every time. The table has medians, the median of the rounds' ratios, and the quartiles of these (25 and
75 %).

Every network is checked before it is timed. An identity conversion must predict, bit for bit (float32), what its static
network predicts. With the weights that are timed it must predict what the reference formulas give. Compiled, in half
precision and in training it is checked as it is timed, with gradients. ``--edges open`` gives every edge a weight;
``identity`` times the conversion, in which the kernels do not read the edges of weight 0. ``--removed SHARE`` draws new
random paths past this share of the blocks for every image and round, and prints the share of the static network's
multiply-adds that remains. The column *limit* is 1 + the least time that aggregation's memory traffic takes at the copy
bandwidth measured in the same run, in units of the static network's time.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from dg_timm._files import atomic_write
from dg_timm.benchmarks import report
from dg_timm.benchmarks.aggregation import measure_aggregation
from dg_timm.benchmarks.figures import draw_results
from dg_timm.benchmarks.memory import explain_lack_of_memory
from dg_timm.benchmarks.options import parse, settings_of, specs_of
from dg_timm.benchmarks.peaks import measure_peaks
from dg_timm.benchmarks.setting import Row
from dg_timm.benchmarks.times import measure_times
from dg_timm.cli.errors import cli_errors

SWEEP = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)  # shares of the blocks


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    args = parse(argv, __doc__)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = report.describe_origin(args, sys.argv[1:] if argv is None else argv)
    with explain_lack_of_memory():
        result |= _measure(args)
    if args.json:
        atomic_write(args.json, json.dumps(result, indent=1) + "\n")
    if args.plot:
        draw_results(args.plot, result)
    return 0


def _measure(args: argparse.Namespace) -> dict[str, list[Row]]:
    """Measure, and print the tables."""
    specs, settings = specs_of(args), settings_of(args)
    if args.aggregation:
        rows = measure_aggregation(specs, settings, args.rounds)
        print(report.table(rows, report.AGGREGATION))
        return {"aggregation": rows}
    if args.memory:
        rows = [row for setting in settings for row in measure_peaks(specs, setting, args.threads)]
        print(report.table(rows, report.MEMORY))
        return {"memory": rows}
    if args.sweep:
        rows = [
            row
            for setting, name, share in itertools.product(settings, specs, SWEEP)
            for row in measure_times([name], dataclasses.replace(setting, removed=share), args.rounds)
        ]
        print(report.table(rows, report.TIMES))
        fits = report.fit_lines(rows)
        print(report.table(fits, report.FITS))
        return {"sweep": rows, "fits": fits}
    rows = []
    for setting, group in itertools.product(settings, [[name] for name in specs] if args.zoo else [specs]):
        found = measure_times(group, setting, args.rounds)
        print(report.table(found, report.TIMES, header=not rows), flush=True)
        rows += found
    return {"times": rows}


if __name__ == "__main__":
    raise SystemExit(main())
