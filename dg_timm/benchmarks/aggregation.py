"""Time aggregation alone, in every way that was considered, beside a copy of the same machine in the same rounds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from dg_timm._views import run_on_meta
from dg_timm.benchmarks.candidates import split_spec
from dg_timm.benchmarks.equivalence import NotEquivalent
from dg_timm.benchmarks.setting import Row, Setting
from dg_timm.benchmarks.timing import MemoryCopy, order_of_round, seconds
from dg_timm.execution import operators
from dg_timm.graph import edges
from dg_timm.graph.stage import DGStage
from dg_timm.training.run import networks

_WITH_GRADIENTS = "forward and backward: "


@dataclass(frozen=True)
class Way:
    """One way to aggregate.

    Attributes:
        run: does it once.
        moved: maps that it must read and write at least.
    """

    run: Callable[[], Any]
    moved: int


def by_buffer(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Multiply matrices over a buffer that holds all maps of an image; as :func:`operators.weighted_sum`."""
    buffer = torch.stack([s.flatten(1) for s in sources], dim=1)
    return torch.bmm(weights[:, None], buffer).view_as(sources[0])


def measure_aggregation(specs: list[str], settings: list[Setting], rounds: int) -> list[Row]:
    """Time the node with the most predecessors in every stage of every network; each shape once.

    Raises:
        NotEquivalent: if a way does not give the weighted sum.
    """
    rows = []
    for setting in settings:
        done = set()
        for spec in specs:
            model = networks.create(split_spec(spec)[0])
            for shape, in_degree in find_nodes(model, setting):
                if (shape, in_degree) not in done:
                    done.add((shape, in_degree))
                    rows += _measure_node(shape, in_degree, setting, rounds)
    return rows


def find_nodes(model: nn.Module, setting: Setting) -> list[tuple[tuple[int, ...], int]]:
    """Find of every stage the shape of a feature (channels, height, width) and the in-degree of its output."""
    found: list[tuple[tuple[int, ...], int]] = []

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if isinstance(module, DGStage):
            found.append((tuple(out.shape[1:]), len(module.block_names) + 1))

    run_on_meta(model, record, setting.input_size)
    return found


def _make_ways(maps: list[Tensor], weights: Tensor) -> dict[str, Way]:
    """List the ways to add up maps, and to form their gradients; each is compared with the reference formula first."""
    in_degree, dtype = len(maps), maps[0].dtype
    expected = edges.weighted_sum(maps, weights)
    compiled = torch.compile(edges.weighted_sum, dynamic=False)
    sums: dict[str, Callable[[], Tensor]] = {
        "kernels": lambda: operators.weighted_sum(maps, weights),
        "reference": lambda: edges.weighted_sum(maps, weights),
        "buffer and bmm": lambda: by_buffer(maps, weights.to(dtype)),
        "compiled": lambda: compiled(maps, weights),
    }
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for name, run in sums.items():
        if not torch.allclose(run().float(), expected.float(), tolerance, tolerance):
            raise NotEquivalent(f"{name} does not give the weighted sum; it is not timed")
    learning = weights.clone().requires_grad_()
    leaves = [m.clone().requires_grad_() for m in maps]
    gradient = torch.randn_like(expected)

    def with_gradients(function: Callable[[list[Tensor], Tensor], Tensor]) -> Way:
        def run() -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(function(leaves, learning), [*leaves, learning], gradient)

        return Way(run, 4 * in_degree + 2)  # z; then for every source x, g, dx ...

    return {
        **{name: Way(run, in_degree + 1) for name, run in sums.items()},
        "gradients: kernels": Way(lambda: operators.product_gradients(maps, expected, weights), in_degree + 2),
        f"{_WITH_GRADIENTS}reference": with_gradients(edges.weighted_sum),
        f"{_WITH_GRADIENTS}compiled": with_gradients(compiled),
    }


def _measure_node(shape: tuple[int, ...], in_degree: int, setting: Setting, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    size, layout = (setting.batch_size, *shape), setting.memory_format
    maps = [
        torch.randn(size, device=setting.device).to(setting.torch_dtype).contiguous(memory_format=layout)
        for _ in range(in_degree)
    ]
    ways = _make_ways(maps, torch.rand(setting.batch_size, in_degree, device=setting.device))
    copy = MemoryCopy(setting.device)
    runs: dict[str, Callable[[], Any]] = {"copy": copy, **{name: way.run for name, way in ways.items()}}
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():  # warm up
            run(), run()
        for number in range(rounds):
            for name in order_of_round(runs, number):
                times[name].append(seconds(runs[name], setting.device))
    map_bytes = maps[0].numel() * maps[0].element_size()
    rows = []
    for name, way in ways.items():
        moved = way.moved * map_bytes
        shares = [moved / t / (copy.bytes / c) for t, c in zip(times[name], times["copy"], strict=True)]
        low, _, high = quantiles(shares, n=4)
        rows.append({
            "way": name, "shape": "x".join(map(str, size)), "in_degree": in_degree, "layout": setting.layout,
            "dtype": setting.dtype, "device": setting.device, "map_mib": round(map_bytes / 2**20, 1), "rounds": rounds,
            "ms": round(1000 * median(times[name]), 3), "gb_s": round(moved / median(times[name]) / 1e9, 1),
            "copy_gb_s": round(copy.bytes / median(times["copy"]) / 1e9, 1), "share": round(median(shares), 3),
            "low": round(low, 3), "high": round(high, 3),
        })  # fmt: skip
    return rows
