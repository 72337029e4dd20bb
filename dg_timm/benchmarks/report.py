"""How benchmark.py tells what it measured: Markdown tables, a JSON file, a plot."""

import os
import platform
import sys
from pathlib import Path
from statistics import correlation, linear_regression
from typing import Any

import timm
import torch

import dg_timm

Row = dict[str, Any]
Columns = dict[str, str]  # heading -> key

_SETTING: Columns = {"mode": "mode", "batch": "batch_size", "px": "image_size", "layout": "layout", "dtype": "dtype"}
_LINE = ("model", *_SETTING.values())  # rows that differ in nothing else lie on one line
TIMES: Columns = {
    "model": "model", **_SETTING, "static ms": "static_ms", "ms": "dynamic_ms", "ratio": "ratio", "quartile": "low",
    "to": "high", "multiply-adds": "cost", "limit": "limit",
}  # fmt: skip
MEMORY: Columns = {"model": "model", **_SETTING, "before MiB": "before_mib", "peak MiB": "peak_mib", "ratio": "ratio"}
AGGREGATION: Columns = {
    "way": "way", "maps": "shape", "in-degree": "in_degree", "layout": "layout", "dtype": "dtype",
    "MiB a map": "map_mib", "ms": "ms", "GB/s": "gb_s", "copy GB/s": "copy_gb_s", "share": "share",
    "quartile": "low", "to": "high",
}  # fmt: skip
FITS: Columns = {
    "model": "model", **_SETTING, "points": "points", "time at cost 0": "intercept",
    "slope": "slope", "R^2": "r_squared",
}  # fmt: skip


def provenance(args: Any) -> dict[str, Any]:
    """What a figure must carry: command, hardware, software."""
    on_gpu = torch.device(args.device).type == "cuda"
    hardware = (
        torch.cuda.get_device_name(args.device) if on_gpu else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )
    software = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    return {
        "command": " ".join(["train_scripts/benchmark.py", *sys.argv[1:]]),
        "hardware": f"{args.threads} threads on {hardware}, {' and '.join(args.dtype)}",
        "software": f"{software}, dg_timm {dg_timm.__version__}",
    }


def table(rows: list[Row], columns: Columns, header: bool = True) -> str:
    """A Markdown table of those columns that some row has."""
    shown = {heading: key for heading, key in columns.items() if any(key in row for row in rows)}
    if columns is TIMES:  # printed in parts: every part has the same columns
        shown = columns
    lines = [f"| {' | '.join(shown)} |", "|" + "---|" * len(shown)] if header else []
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in shown.values()) + " |" for row in rows]
    return "\n".join(lines)


def fits(rows: list[Row]) -> list[Row]:
    """Lines through measured time over predicted cost, both relative to the static network."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in _LINE), []).append(row)
    found = []
    for line, group in groups.items():
        cost, time = [row["cost"] for row in group], [row["ratio"] for row in group]
        slope, intercept = linear_regression(cost, time)
        found.append({
            **dict(zip(_LINE, line, strict=True)), "points": len(group), "slope": round(slope, 3),
            "intercept": round(intercept, 3), "r_squared": round(correlation(cost, time) ** 2, 4),
        })  # fmt: skip
    return found


def write(path: Path, text: str) -> None:
    """Beside its place, then renamed: what was there is whole until the new is."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)


def plot(path: Path, result: dict[str, Any]) -> None:
    """Times relative to the static network: over the cost of a sweep, or as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    if "sweep" in result:
        for fit in result["fits"]:
            mine = [r for r in result["sweep"] if all(r[key] == fit[key] for key in _LINE)]
            label = f"{', '.join(str(fit[key]) for key in _LINE)} (R² {fit['r_squared']:.3f})"
            (line,) = axes.plot([r["cost"] for r in mine], [r["ratio"] for r in mine], "o", label=label)
            ends = [min(r["cost"] for r in mine), max(r["cost"] for r in mine)]
            axes.plot(ends, [fit["intercept"] + fit["slope"] * x for x in ends], "-", color=line.get_color(), lw=1)
        axes.set_xlabel("predicted: multiply-adds relative to the static network")
        axes.set_ylabel("measured: time relative to the static network")
        axes.set_xlim(left=0)
    else:
        kind = next(key for key in ("times", "memory", "aggregation") if key in result)
        key = "share" if kind == "aggregation" else "ratio"
        told = ("model", "way", "mode", "shape", "in_degree", "batch_size", "image_size", "layout", "dtype")
        names = [" ".join(str(r[key]) for key in told if key in r) for r in result[kind]]
        figure.set_size_inches(9, max(2.5, 0.22 * len(names) + 1))
        values = [r[key] for r in result[kind]]
        spread = [[v - r.get("low", v) for v, r in zip(values, result[kind], strict=True)],
                  [r.get("high", v) - v for v, r in zip(values, result[kind], strict=True)]]  # fmt: skip
        places = range(len(names))  # two bars may have one name
        axes.barh(places, values, xerr=spread, color="tab:blue", error_kw={"lw": 1})
        axes.set_yticks(places, names, fontsize=7)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.axvline(1.0, color="black", lw=1)
        axes.invert_yaxis()
        axes.set_xlabel(
            "share of the copy bandwidth" if kind == "aggregation" else f"{kind} relative to the static network"
        )
    axes.set_ylim(bottom=0) if "sweep" in result else None
    if "sweep" in result:
        axes.legend(fontsize=8)
    beside = path.with_name(f"{path.stem}.tmp{path.suffix or '.png'}")
    figure.savefig(beside, dpi=140)
    beside.replace(path)
    pyplot.close(figure)
