"""Run a large batch in chunks whose activations fit the processor's caches.

A stage is independent across images, and a graph holds many maps at once. In inference on CPUs we therefore run the
batch in chunks. A chunk is big enough to use all threads and to amortize reading the weights.

Convolutions may take another algorithm for a smaller batch, and round otherwise: on one thread torch 2.14.1 leaves
oneDNN below 16 images. A stage that is a static one's conversion therefore runs in chunks only where that was shown to
change no bit: once for each shape that comes again, on random maps, for this machine's algorithms. Nobody has another
network's bits from elsewhere: it runs in chunks from its first call on, and sparse execution does, too.
"""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dg_timm import _compat
from dg_timm.execution.sparse import BATCH_NORMS
from dg_timm.graph.gate import Gate
from dg_timm.graph.router import Router
from dg_timm.graph.stage import DGStage

# How much may be live in a chunk for each thread: a few times the cache of a core. What is live is an upper bound.
CHUNK_BYTES_PER_THREAD = 6 * 2**20
MIN_IMAGES = 2  # a single image takes other algorithms of some convolutions


class _Finding(NamedTuple):
    """Whether chunks give the same bits (None at first sight), and the modules of which that was found."""

    is_exact: bool | None
    modules: list[weakref.ref[nn.Module]]


# Of each stage, the settings met so far.
_known: "weakref.WeakKeyDictionary[DGStage, dict[tuple[object, ...], _Finding]]" = weakref.WeakKeyDictionary()
_MAX_SETTINGS = 64  # of a stage; a model that sees more shapes than these is not chunked for the others


def num_chunks(stage: DGStage, x: Tensor) -> int:
    """In how many chunks a batch may run: (batch, in_chs, height, width) of plain memory -> at least 1.

    A hook on a module of the stage sees the whole batch, and so does a norm that takes its statistics.
    """
    if (
        x.device.type != "cpu"
        or stage.training
        or stage.peak_ratio is None
        or len(x) < 2 * MIN_IMAGES
        or torch.is_grad_enabled()
    ):
        return 1
    per_image = stage.peak_ratio * x[0].numel() * x.element_size()
    weights = sum(p.numel() for p in stage.parameters()) * x.element_size()
    threads = torch.get_num_threads()
    images = max(MIN_IMAGES, threads, threads * CHUNK_BYTES_PER_THREAD / per_image, weights / per_image)
    chunks = int(len(x) // images)
    if chunks > 1 and (_compat.has_global_hooks() or any(_sees_the_batch(m) for m in stage.modules())):
        return 1
    return max(chunks, 1)


def run_chunks(run: Callable[[Tensor], Tensor], x: Tensor, chunks: int) -> Tensor:
    """Run a batch in chunks, one after another."""
    return torch.cat([run(chunk) for chunk in x.tensor_split(chunks)]) if chunks > 1 else run(x)


def may_run(stage: DGStage, run_by: Callable[[DGStage, Tensor], Tensor], x: Tensor, chunks: int) -> bool:
    """Whether a dense stage may run in this many chunks: its bits are nobody's promise, or they are the same.

    Args:
        stage: about to run.
        run_by: runs a stage, this one or a copy, as this one is about to.
        x: its whole batch.
        chunks: how many.
    """
    finding = _known.get(stage, {}).get(_setting(x, chunks))
    if finding is None or not finding.is_exact:
        promised = all(router.is_identity() for router in stage.children() if isinstance(router, Router))
        if not promised and all(map(_is_known, stage.modules())):
            return True
    return is_exact(stage, run_by, x, chunks)


def is_exact(stage: DGStage, run_by: Callable[[DGStage, Tensor], Tensor], x: Tensor, chunks: int) -> bool:
    """Whether this many chunks are known to give what the whole batch gives, to the bit.

    The first call for a shape says no, so that a shape that never comes again costs nothing; the second one finds out.
    A copy with other weights tells, because some weights hide what a layer rounds (a norm that starts at 0), and
    weights change.
    """
    known = _known.setdefault(stage, {})
    setting = _setting(x, chunks)
    modules = list(stage.modules())
    if not all(map(_is_known, modules)):
        return False
    finding = known.get(setting)
    if finding is None and len(known) == _MAX_SETTINGS:
        return False
    if finding is None or not _are_same(finding.modules, modules):  # any may be replaced, also inside of a block
        known[setting] = _Finding(None, [weakref.ref(module) for module in modules])
        return False
    if finding.is_exact is None:
        generator = torch.Generator().manual_seed(0)  # no random number of the user's is drawn
        probe = torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))
        run = partial(run_by, _with_random_blocks(stage, generator))
        finding = finding._replace(is_exact=torch.equal(run(probe), run_chunks(run, probe, chunks)))
        known[setting] = finding
    return bool(finding.is_exact)


def _with_random_blocks(stage: DGStage, generator: torch.Generator) -> DGStage:
    """Copy a stage; its blocks get weights that hide nothing and keep features in range, its graph stays."""
    twin = copy.deepcopy(stage)
    kept = {id(t) for m in twin.modules() if isinstance(m, (Router, Gate)) for t in (*m.parameters(), *m.buffers())}
    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.is_floating_point() and id(tensor) not in kept:
            values = torch.rand(tensor.shape, generator=generator)  # 0.5 to 1.5: also variances, and scales of norms
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 0
            with torch.no_grad():
                tensor.copy_((values - 0.5) * (12 / fan_in) ** 0.5 if fan_in else values + 0.5)
    return twin


def _are_same(before: list[weakref.ref[nn.Module]], now: list[nn.Module]) -> bool:
    return len(before) == len(now) and all(ref() is module for ref, module in zip(before, now, strict=True))


def _setting(x: Tensor, chunks: int) -> tuple[object, ...]:
    """What decides how a stage rounds: the batch, and which algorithms torch takes for its layers on a CPU."""
    return (
        x.shape,
        x.stride(),
        x.dtype,
        chunks,
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


def _is_known(module: nn.Module) -> bool:
    """Whether a module is torch's, timm's or ours, and keeps nothing of what it sees: a user's may count or observe."""
    is_own = "forward" in vars(module)  # put on the instance
    return not is_own and type(module).__module__.startswith(("torch.nn.", "timm.", "torchvision.", "dg_timm."))


def _sees_the_batch(module: nn.Module) -> bool:
    """Whether a module's result may depend on the batch as a whole, or somebody watches it."""
    return (
        module.training
        or (isinstance(module, BATCH_NORMS) and module.running_mean is None)
        or _compat.has_hooks(module)
    )
