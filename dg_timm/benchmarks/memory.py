"""How much memory a step needs and moves, and whether there is enough."""

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dg_timm._errors import BadState, BadValue
from dg_timm._views import run_on_meta
from dg_timm.benchmarks.setting import Setting
from dg_timm.graph.stage import DGStage

_FLOAT32 = 4  # bytes


def aggregation_bytes(model: nn.Module, setting: Setting) -> float:
    """Count the least that aggregation and routers must move for one image, every map read and written in memory."""
    reads = features = 0

    def count(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal reads, features
        if isinstance(module, DGStage):
            reads += sum(module.edge_macs(args[0][0].numel(), out[0].numel()).values())
            features += (len(module.block_names) + 1) * out[0].numel()

    run_on_meta(model, count, setting.input_size)
    forward = reads + 2 * features  # sums read and written, features pooled
    # once more to gather inputs again; gradients: of the targets, features, one written, and the pool's added to it
    backward = reads + features + reads + 4 * features
    return setting.torch_dtype.itemsize * (forward + (backward if setting.trains else 0))


def memory_needed(model: nn.Module, setting: Setting) -> float:
    """Estimate from below what a step takes, in bytes: weights, and activations for one batch."""
    all_maps = widest = 0

    def count(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal all_maps, widest
        if isinstance(out, Tensor) and isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            all_maps += out[0].numel()
            widest = max(widest, out[0].numel())

    run_on_meta(model, count, setting.input_size)
    weights = sum(p.numel() for p in model.parameters())
    if setting.trains:
        return _FLOAT32 * (3 * weights + setting.batch_size * all_maps)
    return _FLOAT32 * (weights + 2 * setting.batch_size * widest)


def check_memory(what: str, needed: float, setting: Setting) -> None:
    """Raise BadValue if fewer than ``needed`` bytes are free; ``what`` is what they are for."""
    device = setting.torch_device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise BadValue(
            f"{what} does not fit: {setting.mode} at batch size {setting.batch_size} and {setting.image_size} px takes "
            f"at least {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}. "
            "Use a smaller --batch-size or --image-size"
        )


@contextlib.contextmanager
def explain_lack_of_memory() -> Iterator[None]:
    """Raise BadState, with what to do, where an allocation fails."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else ""
        # torch's allocator for CPUs raises a RuntimeError, and mmap an OSError
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in said:
            raise
        raise BadState(f"out of memory{f' ({said})' if said else ''}: use a smaller --batch-size") from error
