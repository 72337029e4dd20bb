"""Compile and call ``cpu.c``: aggregation on CPUs at the speed of memory.

Nothing is compiled on import. The first aggregation on a CPU compiles the file with ``$CC``, ``cc``, ``gcc`` or
``clang`` (about a second), once for each machine and version: the library is kept under ``$XDG_CACHE_HOME/dg_timm`` (by
default ``~/.cache/dg_timm``). Without a compiler, or with ``DG_TIMM_KERNELS=0``, :func:`load` returns None, once with a
warning, and PyTorch's own operations take over.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from dg_timm._files import atomic_path
from dg_timm._hardware import processor_features

SOURCE = Path(__file__).with_name("cpu.c")
PARTS = (SOURCE, SOURCE.with_name("cpu_sparse.h"))
# A fused multiply-add is asked for where torch has one, and nowhere else: results then agree to the bit.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
COMPILERS = ("cc", "gcc", "clang")
_COMPILER_SECONDS = 120


_ADDRESS, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "weighted_sum": [_ADDRESS] * 3 + [_COUNT] * 3 + [_THREADS],
    "product_gradients": [_ADDRESS] * 5 + [_COUNT] * 3 + [_THREADS],
    "channel_means": [_ADDRESS] * 2 + [_COUNT] * 3 + [ctypes.c_int, _THREADS],
    "select_images": [_ADDRESS] * 2 + [_COUNT] * 3,
    "gather_inputs": [_ADDRESS] * 4 + [_COUNT] * 5 + [_THREADS],
    "finish_node": [_ADDRESS] * 9 + [ctypes.c_double] + [_COUNT] * 7 + [ctypes.c_int, _THREADS],
    "close_gates": [_ADDRESS] * 4 + [ctypes.c_double] + [_ADDRESS] * 4 + [ctypes.c_double] + [_COUNT] * 5,
}


class CpuKernels:
    """The functions of the library. Maps are (batch, ...) of one shape, type and layout, dense in memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        # half precision needs a compiler that knows it
        self.dtypes = frozenset(d for d, suffix in SUFFIXES.items() if hasattr(library, f"weighted_sum_{suffix}"))
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        for name, arguments in _ARGUMENTS.items():
            for dtype in self.dtypes:
                function = getattr(library, f"{name}_{SUFFIXES[dtype]}")
                function.argtypes = arguments
                if name in ("select_images", "close_gates"):
                    function.restype = _COUNT
                self._functions[name, dtype] = function

    def weighted_sum(self, out: Tensor, features: Sequence[Tensor], weights: Tensor) -> None:
        """Write ``out[b] = sum_i weights[b, i] * features[i][b]``; weights: contiguous, of :func:`sum_dtype`."""
        batch, n = weights.shape
        function = self._functions["weighted_sum", out.dtype]
        sizes = (batch, n, _length(out), torch.get_num_threads())
        function(out.data_ptr(), _addresses(features), weights.data_ptr(), *sizes)

    def product_gradients(
        self, dx: Tensor | None, dw: Tensor | None, gradients: Sequence[Tensor], x: Tensor, weights: Tensor
    ) -> None:
        """Write, in one pass, ``dx = sum_j weights[:, j] * gradients[j]`` and ``dw[:, j] = <gradients[j], x>``."""
        batch, n = weights.shape
        into = [None if t is None else t.data_ptr() for t in (dx, dw)]
        function, threads = self._functions["product_gradients", x.dtype], torch.get_num_threads()
        weights_and_sizes = (weights.data_ptr(), batch, n, _length(x), threads)
        if function(*into, _addresses(gradients), x.data_ptr(), *weights_and_sizes):
            raise MemoryError("no memory for the gradient of the edge weights; use a smaller batch")

    def channel_means(self, out: Tensor, x: Tensor, channels_last: bool) -> None:
        """Write ``out[b, c]``, the mean of channel c of image b; out: (batch, channels)."""
        batch, channels, height, width = x.shape
        sizes = (batch, channels, height * width, channels_last, torch.get_num_threads())
        self._functions["channel_means", x.dtype](out.data_ptr(), x.data_ptr(), *sizes)

    def sparse_state(self, feature: Tensor, nodes: int, gates: bool) -> "NativeState":
        """Start sparse execution of a stage, with or without gates; ``feature``: that of node 0, of all images."""
        names = ("select_images", "gather_inputs", "finish_node", "close_gates")
        return NativeState([self._functions[name, feature.dtype] for name in names], feature, nodes, gates)


class RouterParameters(NamedTuple):
    """What a router computes with, contiguous and of the maps' type.

    Attributes:
        weight: (edges, channels).
        bias: (edges,).
        scale: (edges,), or None.
        threshold: tau.
        targets: nodes that the edges lead to.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    threshold: float
    targets: tuple[int, ...]

    def pass_to_c(self) -> tuple[Any, ...]:
        """Addresses and threshold, in the order of the C functions."""
        scale = None if self.scale is None else self.scale.data_ptr()
        return self.weight.data_ptr(), self.bias.data_ptr(), scale, _counts(self.targets), self.threshold


class GateParameters(NamedTuple):
    """What a gate computes with: ``weight`` (1, channels), contiguous and of the maps' type; ``bias`` and shift."""

    weight: Tensor
    bias: float


class NativeState:
    """The edge weights of a batch in a stage of which the nodes run in order, and where their features lie.

    Attributes:
        alpha: (batch, nodes, nodes), [source, target]; 0 where an edge is closed or its source was removed.
        pooled: (batch, nodes, channels), of the nodes so far; None in a stage without gates.
        count: images of the node that was selected last; at first all.
    """

    def __init__(self, functions: Sequence[Any], feature: Tensor, nodes: int, gates: bool) -> None:
        self._select, self._gather, self._finish, self._close = functions
        self.batch, self.channels, height, width = feature.shape
        self.nodes, self.area, self.count = nodes, height * width, self.batch
        self._channels_last, self._threads = not feature.is_contiguous(), torch.get_num_threads()
        self.alpha = torch.zeros(self.batch, nodes, nodes, dtype=sum_dtype(feature.dtype), device="cpu")
        self._alpha = self.alpha.data_ptr()
        self.pooled = feature.new_zeros(self.batch, nodes, self.channels) if gates else None
        self._maps = (_ADDRESS * (nodes * self.batch))()
        self._images = (_COUNT * self.batch)(*range(self.batch))

    @property
    def images(self) -> list[int]:
        """The images that were selected last; at first all."""
        return list(self._images[: self.count])

    @images.setter
    def images(self, images: list[int]) -> None:
        self._images, self.count = (_COUNT * self.batch)(*images), len(images)

    def select_all(self) -> None:
        """Select all images, as if each had an open edge into the node that comes next."""
        self._images, self.count = (_COUNT * self.batch)(*range(self.batch)), self.batch

    def select_images(self, target: int) -> int:
        """Select the images with an open edge into a node; give their number."""
        self.count = self._select(self._images, self._alpha, self.batch, self.nodes, target)
        return self.count

    def close_gates(self, node: int, gate: GateParameters, router: RouterParameters) -> int:
        """Leave out the selected images that skip a node; its edges become edges past it. Give the others' number."""
        assert self.pooled is not None
        places = (self._images, self._alpha, self.pooled.data_ptr(), gate.weight.data_ptr(), gate.bias)
        sizes = (node, self.count, self.nodes, self.channels, len(router.targets))
        self.count = self._close(*places, *router.pass_to_c(), *sizes)
        if self.count < 0:
            raise MemoryError("no memory for the pooled inputs of a node; use a smaller batch")
        return self.count

    def gather_inputs(self, z: Tensor, target: int, source: Tensor | None = None) -> None:
        """Write ``z[k]``, the weighted sum that enters a node for the k-th selected image.

        ``source``: (batch, ...), what node 0's edge carries in place of its feature.
        """
        maps, length = self._maps, self.channels * self.area
        if source is not None:
            length = source[0].numel()
            first, step = source.data_ptr(), length * source.element_size()
            maps = (_ADDRESS * self.batch)(*[first + b * step for b in range(self.batch)])
        sizes = (self.count, self.batch, self.nodes, target, length, self._threads)
        self._gather(z.data_ptr(), maps, self._alpha, self._images, *sizes)

    def finish_node(self, node: int, feature: Tensor, router: RouterParameters | None) -> None:
        """Take a node's feature for the selected images, (count, channels, height, width).

        ``router`` weighs its edges (Eqs. 4 and 5); without it they are for the caller to set in ``alpha``.
        """
        plain = (None, None, None, None, 0.0) if router is None else router.pass_to_c()
        edges = 0 if router is None else len(router.targets)
        sizes = (node, self.count, self.batch, self.nodes, self.channels, self.area, edges)
        pooled = None if self.pooled is None else self.pooled.data_ptr()
        places = (self._maps, self._alpha, pooled, self._images, feature.data_ptr())
        if self._finish(*places, *plain, *sizes, self._channels_last, self._threads):
            raise MemoryError("no memory for the means of a node's channels; use a smaller batch")


@functools.lru_cache(maxsize=4096)
def _counts(numbers: tuple[int, ...]) -> "ctypes.Array[ctypes.c_int64]":
    return (_COUNT * len(numbers))(*numbers)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels take weights in and sum in: float64 for float64 maps, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _addresses(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (_ADDRESS * len(tensors))(*[t.data_ptr() for t in tensors])


def _length(maps: Tensor) -> int:
    return maps[0].numel() if len(maps) else 0


@functools.cache
def load() -> CpuKernels | None:
    """The kernels, compiled if need be; None without a compiler (a warning says so, once) or with DG_TIMM_KERNELS=0."""
    if os.environ.get("DG_TIMM_KERNELS", "1") == "0":
        return None
    try:
        return open_library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:300]
        warnings.warn(
            "aggregation runs on PyTorch's own operations, which is slower: its kernels could not be compiled "
            f"({reason}). Install a C compiler with OpenMP (gcc) or name one in CC; DG_TIMM_KERNELS=0 silences this",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def open_library() -> CpuKernels:
    """Compile the library unless this machine has it, and load it.

    One process compiles; others that start at the same time wait for it.

    Raises:
        RuntimeError: without a compiler, or if it fails.
        OSError: if the library can't be written or loaded.
    """
    command, library = _build()
    with FileLock(library.with_suffix(".lock"), timeout=_COMPILER_SECONDS):
        if library.exists():
            try:
                return CpuKernels(ctypes.CDLL(str(library)))
            except (OSError, AttributeError):  # damaged since it was compiled
                library.unlink()
        _compile(command, library)
        return CpuKernels(ctypes.CDLL(str(library)))


def _build() -> tuple[list[str], Path]:
    """The compiler, and the library that it makes of this source on this processor."""
    named = shlex.split(os.environ.get("CC", ""))
    compiler = named or [c for c in COMPILERS if shutil.which(c)][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        raise RuntimeError(f"CC={named[0]} not found" if named else f"none of {', '.join(COMPILERS)} found")
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, timeout=_COMPILER_SECONDS, check=True
    ).stdout
    made_of = (*(part.read_bytes() for part in PARTS), version, repr((compiler, FLAGS)).encode(), processor_features())
    name = f"cpu_kernels-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:20]}.so"
    return compiler, _folder() / name


@functools.cache
def _folder() -> Path:
    """Where libraries are kept: what is loaded must be what was compiled, so nobody else may write there."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dg_timm"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat()
        is_ours = not hasattr(os, "getuid") or owner.st_uid == os.getuid()
        if is_ours and not owner.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or not writable
        pass
    folder = Path(tempfile.mkdtemp(prefix="dg_timm-"))  # for this process alone
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compile(compiler: list[str], library: Path) -> None:
    with atomic_path(library) as temporary:
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(temporary), "-lm"]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_COMPILER_SECONDS
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr or done.returncode}")
