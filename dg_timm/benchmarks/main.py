"""Time networks beside each other: static and dynamic, in one run, each in its turn.

    python train_scripts/benchmark.py dg_resnet50 --batch-size 8 32 --layout nchw channels_last --mode training
    python train_scripts/benchmark.py dg_resnet50:sparse --removed 0.5 --batch-size 1 8 32
    python train_scripts/benchmark.py dg_resnet50 --sweep --plot results/sparse.png
    python train_scripts/benchmark.py dg_resnet50 --memory --mode training
    python train_scripts/benchmark.py dg_resnet50 dg_resnet101 --aggregation
    python train_scripts/benchmark.py --zoo --edges identity --json results/inference_cpu.json

A model is a name of timm's or of the zoo, with the execution after a colon (``dg_resnet50:sparse``; dense without). The
static twin of every dynamic network takes part, and ratios are against it. A round runs every model once, in an order
that turns round every time; the table has medians, the median of the rounds' ratios, and its quartiles.

Nothing is timed before it predicts what it must: an identity conversion bit for bit what its twin predicts (float32),
then, with the weights that are timed, what the reference formulas give; compiled, in half precision and in training as
it is timed, with gradients. ``--edges open`` (the default) gives every edge
a weight; ``identity`` times the conversion, in which the kernels do not read the edges of weight 0. ``--removed F``
draws new random paths past a share F of the blocks for every image and round, and prints the share of the static
network's multiply-adds that remains. The column *limit* is 1 + the least time that aggregation's memory traffic takes
at the copy bandwidth measured in the same run, in units of the static network's time.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import dg_timm
from dg_timm.benchmarks import aggregation as benchmark_aggregation
from dg_timm.benchmarks import networks as models
from dg_timm.benchmarks import report

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SWEEP = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(models.peak_memory(args.memory_of, settings(args)[0])))
        return
    result: dict[str, Any] = report.provenance(args)
    try:
        if args.aggregation:
            result["aggregation"] = benchmark_aggregation.measure(specs(args), settings(args), args.rounds)
            print(report.table(result["aggregation"], report.AGGREGATION))
        elif args.memory:
            result["memory"] = [row for setting in settings(args) for row in memory(args, setting)]
            print(report.table(result["memory"], report.MEMORY))
        elif args.sweep:
            result["sweep"] = [
                {**row, "removed": share}
                for setting, name, share in itertools.product(settings(args), specs(args), SWEEP)
                for row in models.measure([name], {**setting, "removed": share}, args.rounds)
            ]
            print(report.table(result["sweep"], report.TIMES))
            result["fits"] = report.fits(result["sweep"])
            print(report.table(result["fits"], report.FITS))
        else:
            result["times"] = []
            header = True
            for setting in settings(args):
                groups = [[name] for name in specs(args)] if args.zoo else [specs(args)]
                for group in groups:
                    rows = models.measure(group, setting, args.rounds)
                    print(report.table(rows, report.TIMES, header=header), flush=True)
                    result["times"] += rows
                    header = False
    except (models.Refused, torch.OutOfMemoryError, MemoryError) as error:
        sys.exit(f"benchmark.py: {error or 'out of memory: use a smaller --batch-size'}")
    except (RuntimeError, OSError) as error:
        if "allocate memory" not in str(error):  # of torch's allocator, and of mmap
            raise
        sys.exit(f"benchmark.py: out of memory ({str(error).splitlines()[0]}); use a smaller --batch-size")
    if args.json:
        report.write(args.json, json.dumps(result, indent=1) + "\n")
    if args.plot:
        report.plot(args.plot, result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL[:EXECUTION]", help="for example dg_resnet50:sparse")
    parser.add_argument("--zoo", action="store_true", help="every model of the zoo, one after another")
    parser.add_argument("--mode", nargs="+", choices=("inference", "training"), default=["inference"])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--image-size", type=int, nargs="+", default=[224], help="pixels")
    parser.add_argument("--layout", nargs="+", choices=tuple(LAYOUTS), default=["nchw"])
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["float32"], help="of autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--edges", choices=("open", "identity"), default="open")
    parser.add_argument("--removed", type=float, metavar="F", help="share of the blocks to remove for every image")
    parser.add_argument("--sweep", action="store_true", help="sparse execution from nothing to 90 %% removed")
    parser.add_argument("--memory", action="store_true", help="peak memory, each model in a process of its own")
    parser.add_argument("--aggregation", action="store_true", help="aggregation alone, beside a copy")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this file (needs dg-timm[plots])")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.zoo == bool(args.models) and not args.memory_of:
        parser.error("give models, or --zoo")
    for spec in args.models:
        name, _, execution = spec.partition(":")
        if not timm.is_model(name):
            near = (
                ", ".join(timm.list_models(f"*{name.removeprefix('dg_')[:8]}*")[:8])
                or "timm.list_models() has them all"
            )
            parser.error(f"there is no model {name!r}; near it: {near}")
        if execution and (execution not in dg_timm.execution.settings.EXECUTIONS or not name.startswith("dg_")):
            executions = ", ".join(dg_timm.execution.settings.EXECUTIONS)
            parser.error(f"{spec!r}: the execution of a dg_ model is one of {executions}")
        if execution == "sparse" and "training" in args.mode:
            parser.error(f"{spec!r}: sparse execution is for inference, and --mode says training")
        if args.sweep and (not name.startswith("dg_") or execution not in ("", "sparse")):
            parser.error(f"{spec!r}: --sweep is of dg_ models in sparse execution")
        if args.removed is not None and name.startswith("dg_") and execution not in ("sparse", "static"):
            parser.error(f"{spec!r}: dense execution runs what --removed removes; say {name}:sparse or {name}:static")
    if args.aggregation and not any(spec.startswith("dg_") for spec in args.models) and not args.zoo:
        parser.error("--aggregation needs a dg_ model: a static one aggregates nothing")
    if args.memory and args.removed is not None:
        parser.error("--removed is about time; --memory does not take it")
    for option, least in {"batch_size": 1, "image_size": 32, "rounds": 3, "threads": 1}.items():
        given = getattr(args, option)
        for value in given if isinstance(given, list) else [given]:
            if option == "threads" and value > 16 * (os.cpu_count() or 1):
                parser.error(f"--threads {value} on {os.cpu_count()} cores")
            if value < least:
                parser.error(f"--{option.replace('_', '-')} must be at least {least}, got {value}")
    if args.removed is not None and not 0 <= args.removed <= 1:
        parser.error(f"--removed is a share from 0 to 1, got {args.removed}")
    if (args.removed is not None or args.sweep) and "training" in args.mode:
        parser.error("--removed and --sweep are for inference: the wiring is imposed, not trained")
    try:
        if torch.device(args.device).type not in ("cpu", "cuda"):
            parser.error(f"--device is cpu or cuda, got {args.device}")
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} can't be used: {str(error).splitlines()[0]}")
    for path, endings in ((args.json, (".json",)), (args.plot, (".png", ".pdf", ".svg"))):
        if path and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent} to write {path.name} to")
        if path and (path.suffix not in endings or path.is_dir()):
            parser.error(f"{path} must be a file that ends with {' or '.join(endings)}")


def specs(args: argparse.Namespace) -> list[str]:
    names = list(args.models) or [f"dg_{variant}" for variant in dg_timm.models.registry.VARIANTS]
    return [f"{name}:sparse" if args.sweep and ":" not in name else name for name in names]


def settings(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every combination of what was given several values for."""
    product = itertools.product(args.mode, args.batch_size, args.image_size, args.layout, args.dtype)
    return [
        dict(
            mode=mode, batch_size=batch, image_size=size, layout=layout, dtype=dtype, compile=args.compile,
            device=args.device, edges=args.edges, removed=args.removed,
        )
        for mode, batch, size, layout, dtype in product
    ]  # fmt: skip


def memory(args: argparse.Namespace, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Peak memory of every model, of the static twins first."""
    rows: list[dict[str, Any]] = []
    for spec in models.with_twins(specs(args)):
        command = [sys.executable, __file__, "--memory-of", spec, "--threads", str(args.threads), "--edges", args.edges]
        for option in ("mode", "batch_size", "image_size", "layout", "dtype", "device"):
            command += [f"--{option.replace('_', '-')}", str(setting[option])]
        command += ["--compile"] if setting["compile"] else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
            killed = " (out of memory?): use a smaller --batch-size" if done.returncode == -9 else ""
            raise models.Refused(f"{spec} could not be measured: {said}{killed}")
        row = {"model": spec, **setting, **json.loads(done.stdout.splitlines()[-1])}
        twin = next((r for r in rows if r["model"] == models.twin(spec)), row)
        rows.append({**row, "ratio": round(row["peak_mib"] / twin["peak_mib"], 3)})
    return rows
