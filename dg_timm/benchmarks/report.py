"""What benchmark.py prints and keeps: Markdown tables, lines through a sweep, and where the figures come from."""

import argparse
from collections.abc import Sequence
from statistics import correlation, linear_regression
from typing import Any

import timm
import torch

import dg_timm
from dg_timm._hardware import describe_hardware
from dg_timm._tables import markdown_table
from dg_timm.benchmarks.setting import Row

Columns = dict[str, str]  # heading -> key

_SETTING: Columns = {"mode": "mode", "batch": "batch_size", "px": "image_size", "layout": "layout", "dtype": "dtype"}
LINE = ("model", *_SETTING.values())  # rows that differ in nothing else lie on one line
TIMES: Columns = {
    "model": "model", **_SETTING, "static ms": "static_ms", "ms": "dynamic_ms", "ratio": "ratio", "25 %": "low",
    "75 %": "high", "multiply-adds": "cost", "limit": "limit",
}  # fmt: skip
MEMORY: Columns = {"model": "model", **_SETTING, "before MiB": "before_mib", "peak MiB": "peak_mib", "ratio": "ratio"}
AGGREGATION: Columns = {
    "way": "way", "maps": "shape", "in-degree": "in_degree", "layout": "layout", "dtype": "dtype",
    "MiB a map": "map_mib", "ms": "ms", "GB/s": "gb_s", "copy GB/s": "copy_gb_s", "share": "share",
    "25 %": "low", "75 %": "high",
}  # fmt: skip
FITS: Columns = {
    "model": "model", **_SETTING, "points": "points", "time at cost 0": "intercept",
    "slope": "slope", "R^2": "r_squared",
}  # fmt: skip


def describe_origin(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Describe what the figures come from: command, hardware, software."""
    return {
        "command": " ".join(["train_scripts/benchmark.py", *argv]),
        "hardware": f"{describe_hardware(torch.device(args.device))}, {' and '.join(args.dtype)}",
        "software": f"timm {timm.__version__}, dg_timm {dg_timm.__version__}",
    }


def table(rows: list[Row], columns: Columns, header: bool = True) -> str:
    """Write a Markdown table of the columns that some row has.

    :data:`TIMES` are printed in parts, without ``header`` after the first: every part has the same columns.
    """
    shown = {heading: key for heading, key in columns.items() if any(key in row for row in rows)}
    if columns is TIMES:
        shown = columns
    text = markdown_table(list(shown), [[row.get(key) for key in shown.values()] for row in rows])
    return text if header else "\n".join(text.splitlines()[2:])


def fit_lines(rows: list[Row]) -> list[Row]:
    """Fit lines through measured time over predicted cost, both relative to the static network."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in LINE), []).append(row)
    found = []
    for line, group in groups.items():
        cost, time = [row["cost"] for row in group], [row["ratio"] for row in group]
        slope, intercept = linear_regression(cost, time)
        found.append({
            **dict(zip(LINE, line, strict=True)), "points": len(group), "slope": round(slope, 3),
            "intercept": round(intercept, 3), "r_squared": round(correlation(cost, time) ** 2, 4),
        })  # fmt: skip
    return found
