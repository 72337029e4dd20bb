"""Aggregation alone, in every way that was considered, beside a copy of the same machine in the same rounds."""

from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dg_timm.benchmarks import networks as benchmark_models
from dg_timm.conversion.find import run_on_meta
from dg_timm.execution import aggregation
from dg_timm.graph import edges as graph
from dg_timm.graph.stage import DGStage

Setting = dict[str, Any]


class Copy:
    """A copy larger than the caches, into memory that is there already: the bandwidth that aggregation can hope for."""

    def __init__(self, device: str, megabytes: int = 256) -> None:
        self.source = torch.ones(megabytes * 2**18, device=device)
        self.target = torch.empty_like(self.source).copy_(self.source)
        self.bytes = 2 * self.source.numel() * self.source.element_size()

    def __call__(self) -> None:
        self.target.copy_(self.source)


def by_buffer(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    """One product of matrices over a buffer that holds all maps of an image."""
    buffer = torch.stack([s.flatten(1) for s in sources], dim=1)
    return torch.bmm(weights[:, None], buffer).view_as(sources[0])


def measure(specs: list[str], settings: list[Setting], rounds: int) -> list[dict[str, Any]]:
    """Rows for the node with the most predecessors in every stage of every model."""
    rows = []
    for setting in settings:
        done = set()
        for spec in specs:
            model = timm.create_model(spec.partition(":")[0])
            for shape, sources in nodes(model, setting["image_size"]):
                if (shape, sources) not in done:
                    done.add((shape, sources))
                    rows += measure_node((setting["batch_size"], *shape), sources, setting, rounds)
    return rows


def nodes(model: nn.Module, image_size: int) -> list[tuple[tuple[int, ...], int]]:
    """Of every stage the shape of a feature and the in-degree of its output."""
    found: list[tuple[tuple[int, ...], int]] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        if isinstance(module, DGStage):
            found.append((tuple(out.shape[1:]), len(module.block_names) + 1))

    run_on_meta(model, record, (3, image_size, image_size))
    return found


def measure_node(shape: tuple[int, ...], in_degree: int, setting: Setting, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    device, dtype = setting["device"], getattr(torch, setting["dtype"])
    layout = benchmark_models.layout_of(setting)
    maps = [torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(in_degree)]
    weights = torch.rand(shape[0], in_degree, device=device)
    wanted = graph.aggregate(maps, weights)
    compiled = torch.compile(graph.aggregate, dynamic=False)
    ways: dict[str, Callable[[], Any]] = {
        "kernels": lambda: aggregation.gather(maps, weights),
        "reference": lambda: graph.aggregate(maps, weights),
        "buffer and bmm": lambda: by_buffer(maps, weights.to(dtype)),
        "compiled": lambda: compiled(maps, weights),
    }
    for name, way in ways.items():
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        if not torch.allclose(way().float(), wanted.float(), tolerance, tolerance):
            raise benchmark_models.Refused(f"{name} does not give the weighted sum; it is not timed")
    learning = weights.clone().requires_grad_()
    leaves = [m.clone().requires_grad_() for m in maps]
    g = torch.randn_like(wanted)

    def autograd_of(function: Callable[[list[Tensor], Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(leaves, learning), [*leaves, learning], g)

    ways |= {
        "gradients: kernels": lambda: aggregation.fan_out_gradients(maps, wanted, weights),
        "forward and backward: reference": autograd_of(graph.aggregate),
        "forward and backward: compiled": autograd_of(compiled),
    }
    moved = {
        "gradients: kernels": in_degree + 2,
        "forward and backward: reference": 4 * in_degree + 2,  # z; then for every source x, g, dx ...
        "forward and backward: compiled": 4 * in_degree + 2,
    }
    map_bytes = maps[0].numel() * maps[0].element_size()
    copy = Copy(device)
    times: dict[str, list[float]] = {"copy": [], **{name: [] for name in ways}}
    everything: list[tuple[str, Callable[[], Any]]] = [("copy", copy), *ways.items()]
    for _, way in everything:
        way(), way()
    with torch.no_grad():
        for number in range(rounds):
            for name, way in everything if number % 2 == 0 else reversed(everything):
                with torch.set_grad_enabled(name.startswith("forward")):
                    times[name].append(benchmark_models.seconds(way, device))
    rows = []
    for name in ways:
        size = moved.get(name, in_degree + 1) * map_bytes
        shares = [size / t / (copy.bytes / c) for t, c in zip(times[name], times["copy"], strict=True)]
        low, _, high = quantiles(shares, n=4)
        rows.append({
            "way": name, "shape": "x".join(map(str, shape)), "in_degree": in_degree, "layout": setting["layout"],
            "dtype": setting["dtype"], "device": device, "map_mib": round(map_bytes / 2**20, 1), "rounds": rounds,
            "ms": round(1000 * median(times[name]), 3), "gb_s": round(size / median(times[name]) / 1e9, 1),
            "copy_gb_s": round(copy.bytes / median(times["copy"]) / 1e9, 1), "share": round(median(shares), 3),
            "low": round(low, 3), "high": round(high, 3),
        })  # fmt: skip
    return rows
