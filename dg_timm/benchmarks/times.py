"""Time networks beside each other, in turn."""

import gc
from collections.abc import Mapping
from statistics import mean, median, quantiles
from typing import Any

import torch

from dg_timm.benchmarks.candidates import Candidate, build_candidate, static_name, with_static_networks
from dg_timm.benchmarks.equivalence import check_as_timed
from dg_timm.benchmarks.memory import aggregation_bytes, check_memory, memory_needed
from dg_timm.benchmarks.setting import Row, Setting
from dg_timm.benchmarks.steps import make_step, random_images
from dg_timm.benchmarks.timing import MemoryCopy, order_of_round, seconds
from dg_timm.graph.stage import graph_stages


def measure_times(specs: list[str], setting: Setting, rounds: int) -> list[Row]:
    """Time networks, and the static networks of those that are dynamic.

    Args:
        specs: names, with the execution after a colon.
        setting: under which all are timed.
        rounds: how often each runs, at least 3; the order turns round every time.

    Returns:
        a row for each, with times in ms for an image.

    Raises:
        BadValue: if they do not fit into memory.
        NotEquivalent: if one does not give what it must; nothing is then timed.
    """
    images = random_images(setting)
    candidates: dict[str, Candidate] = {}
    for spec in with_static_networks(specs):
        candidates[spec] = build_candidate(spec, setting, images, candidates)
    needed = sum(memory_needed(candidate.model, setting) for candidate in candidates.values())
    check_memory(" + ".join(candidates), needed, setting)
    steps = {}
    for spec, candidate in candidates.items():
        model: Any = torch.compile(candidate.model) if setting.compile else candidate.model
        check_as_timed(spec, model, candidate.model, images, setting)
        steps[spec] = make_step(model, setting, images)
        candidate.prepare()
        for _ in range(3 if setting.compile else 2):  # warm up
            steps[spec]()
    copy = MemoryCopy(setting.device)
    bandwidths = []
    for number in range(rounds):
        for candidate in order_of_round(candidates.values(), number):
            cost = candidate.prepare()
            if cost is not None:
                candidate.costs.append(cost)
            took = seconds(steps[candidate.spec], setting.device)
            candidate.milliseconds.append(1000 * took / setting.batch_size)
        bandwidths.append(copy.bytes / seconds(copy, setting.device))
    rows = [_row(candidate, candidates, setting, median(bandwidths)) for candidate in candidates.values()]
    gc.collect()
    return [row for row in rows if row["model"] in specs]


def _row(candidate: Candidate, candidates: Mapping[str, Candidate], setting: Setting, bandwidth: float) -> Row:
    static = candidates.get(static_name(candidate.spec), next(iter(candidates.values())))
    ratios = [own / base for base, own in zip(static.milliseconds, candidate.milliseconds, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    row: Row = {
        "model": candidate.spec,
        **setting.as_row(),
        "rounds": len(ratios),
        "static_rounds_ms": [round(value, 3) for value in static.milliseconds],
        "dynamic_rounds_ms": [round(value, 3) for value in candidate.milliseconds],
        "static_ms": round(median(static.milliseconds), 2),
        "dynamic_ms": round(median(candidate.milliseconds), 2),
        "ratio": round(median(ratios), 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "copy_gb_s": round(bandwidth / 1e9, 1),
    }
    if candidate.costs:
        row["cost"] = round(mean(candidate.costs), 4)
    elif graph_stages(candidate.model):
        traffic = aggregation_bytes(candidate.model, setting) / bandwidth
        row["limit"] = round(1 + 1000 * traffic / median(static.milliseconds), 3)
    return row
