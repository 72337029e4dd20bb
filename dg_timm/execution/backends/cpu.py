"""Compiles and calls ``cpu.c``: aggregation on CPUs at the speed of memory.

Nothing is compiled on import. The first aggregation on a CPU compiles the file with ``$CC``, ``cc``, ``gcc`` or
``clang`` (about a second), once for each machine and version: the library is kept under ``$XDG_CACHE_HOME/dg_timm`` (by
default ``~/.cache/dg_timm``). Without a compiler, or with ``DG_TIMM_KERNELS=0``, :func:`load` returns None, once with a
warning, and PyTorch's own operations take over.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.c")
# A fused multiply-add is asked for where torch has one, and nowhere else: results then agree to the bit.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 120


_ADDRESS, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "gather": [_ADDRESS] * 3 + [_COUNT] * 3 + [_THREADS],
    "fan_out": [_ADDRESS] * 5 + [_COUNT] * 3 + [_THREADS],
    "pool": [_ADDRESS] * 2 + [_COUNT] * 3 + [ctypes.c_int, _THREADS],
    "enter": [_ADDRESS] * 2 + [_COUNT] * 3,
    "read": [_ADDRESS] * 4 + [_COUNT] * 5 + [_THREADS],
    "leave": [_ADDRESS] * 8 + [ctypes.c_double] + [_COUNT] * 7 + [ctypes.c_int, _THREADS],
}


# Of a router: weight, bias, scale (or None), threshold, and the nodes that its edges lead to.
RouterParameters = tuple[Tensor, Tensor, Optional[Tensor], float, tuple[int, ...]]


class Kernels:
    """The functions of the library. Maps are (batch, ...) of one shape, type and layout, dense in memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        # half precision needs a compiler that knows it
        self.dtypes = {dtype for dtype, suffix in SUFFIXES.items() if hasattr(library, f"gather_{suffix}")}
        self._functions = {}
        for name, arguments in _ARGUMENTS.items():
            for dtype in self.dtypes:
                function = getattr(library, f"{name}_{SUFFIXES[dtype]}")
                function.argtypes = arguments
                if name == "enter":
                    function.restype = _COUNT
                self._functions[name, dtype] = function

    def gather(self, out: Tensor, sources: Sequence[Tensor], weights: Tensor) -> None:
        """``out[b] = sum_i weights[b, i] * sources[i][b]``; weights: (batch, n), contiguous, of :func:`sum_dtype`."""
        batch, n = weights.shape
        function = self._functions["gather", out.dtype]
        function(
            out.data_ptr(), _addresses(sources), weights.data_ptr(), batch, n, _length(out), torch.get_num_threads()
        )

    def fan_out(
        self, dx: Optional[Tensor], dw: Optional[Tensor], gradients: Sequence[Tensor], x: Tensor, weights: Tensor
    ) -> None:
        """In one pass ``dx = sum_j weights[:, j] * gradients[j]`` and ``dw[:, j] = <gradients[j], x>``, by image."""
        batch, n = weights.shape
        into = [None if t is None else t.data_ptr() for t in (dx, dw)]
        function, threads = self._functions["fan_out", x.dtype], torch.get_num_threads()
        weights_and_sizes = (weights.data_ptr(), batch, n, _length(x), threads)
        if function(*into, _addresses(gradients), x.data_ptr(), *weights_and_sizes):
            raise MemoryError("no memory for the gradient of the edge weights; use a smaller batch")

    def pool(self, out: Tensor, x: Tensor, channels_last: bool) -> None:
        """``out[b, c]`` = the mean of channel c of image b; out: (batch, channels)."""
        batch, channels, height, width = x.shape
        sizes = (batch, channels, height * width, channels_last, torch.get_num_threads())
        self._functions["pool", x.dtype](out.data_ptr(), x.data_ptr(), *sizes)

    def graph(self, node0: Tensor, nodes: int) -> "Graph":
        """For sparse execution of a stage; ``node0``: the maps of node 0, of all images."""
        functions = {name: self._functions[name, node0.dtype] for name in ("enter", "read", "leave")}
        return Graph(functions, node0, nodes)


class Graph:
    """The topology of a batch in a stage of which the nodes run in order, and where their maps lie.

    Attributes:
        alpha: (batch, nodes, nodes), [source, target]; 0 where an edge is closed or its source was removed.
    """

    def __init__(self, functions: dict[str, Any], node0: Tensor, nodes: int) -> None:
        self._enter, self._read, self._leave = functions["enter"], functions["read"], functions["leave"]
        self.batch, self.channels, height, width = node0.shape
        self.nodes, self.area = nodes, height * width
        self._channels_last, self._threads = not node0.is_contiguous(), torch.get_num_threads()
        self.alpha = torch.zeros(self.batch, nodes, nodes, dtype=sum_dtype(node0.dtype), device="cpu")
        self._alpha = self.alpha.data_ptr()
        self._maps = (_ADDRESS * (nodes * self.batch))()
        self._images = (_COUNT * self.batch)(*range(self.batch))

    @property
    def images(self) -> list[int]:
        """Those of the node that was entered last, as many as :meth:`enter` said; at first all."""
        return list(self._images)

    def everyone(self) -> None:
        """As if all images had an open edge into the node that comes next."""
        self._images = (_COUNT * self.batch)(*range(self.batch))

    def enter(self, target: int) -> int:
        """How many images have an open edge into a node."""
        count: int = self._enter(self._images, self._alpha, self.batch, self.nodes, target)
        return count

    def read(self, z: Tensor, count: int, target: int) -> None:
        """``z[k]`` = what the edges into a node carry for the k-th of the images that were entered."""
        self._gather(z, self._maps, count, target, self.channels * self.area)

    def read_instead(self, z: Tensor, count: int, target: int, instead: Tensor) -> None:
        """As :meth:`read`; ``instead``: (batch, ...) what node 0's edge carries in place of its feature."""
        length = instead[0].numel()
        first, step = instead.data_ptr(), length * instead.element_size()
        maps = (_ADDRESS * self.batch)(*[first + b * step for b in range(self.batch)])
        self._gather(z, maps, count, target, length)

    def _gather(self, z: Tensor, maps: Any, count: int, target: int, length: int) -> None:
        self._read(
            z.data_ptr(), maps, self._alpha, self._images, count, self.batch, self.nodes, target, length, self._threads
        )

    def leave(self, node: int, maps: Tensor, count: int, router: Optional[RouterParameters] = None) -> None:
        """A node has run for the images that were entered: (count, channels, height, width).

        ``router``: what weighs its edges (Eqs. 4 and 5), contiguous and of the maps' type; without it they are for the
        caller to set in ``alpha``.
        """
        weight, bias, scale, threshold, targets = router or (None, None, None, 0.0, ())
        failed = self._leave(
            self._maps, self._alpha, self._images, maps.data_ptr(), None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(), None if scale is None else scale.data_ptr(), _counts(targets),
            threshold, node, count, self.batch, self.nodes, self.channels, self.area, len(targets),
            self._channels_last, self._threads,
        )  # fmt: skip
        if failed:
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
def load() -> Optional[Kernels]:
    """The kernels, compiled if need be; None without a compiler (a warning says so, once) or with DG_TIMM_KERNELS=0."""
    if os.environ.get("DG_TIMM_KERNELS", "1") == "0":
        return None
    try:
        library = _compiled()
        try:
            return Kernels(ctypes.CDLL(str(library)))
        except OSError:  # damaged since it was compiled
            library.unlink()
            return Kernels(ctypes.CDLL(str(_compiled())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:300]
        warnings.warn(
            "aggregation runs on PyTorch's own operations, which is slower: its kernels could not be compiled "
            f"({reason}). Install a C compiler with OpenMP (gcc) or name one in CC; DG_TIMM_KERNELS=0 silences this",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _compiled() -> Path:
    named = shlex.split(os.environ.get("CC", ""))
    compiler = named or [c for c in COMPILERS if shutil.which(c)][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        raise RuntimeError(f"CC={named[0]} not found" if named else f"none of {', '.join(COMPILERS)} found")
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_SECONDS, check=True).stdout
    made_of = (SOURCE.read_bytes(), version, repr((compiler, FLAGS)).encode(), _processor())
    name = f"cpu_kernels-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:20]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dg_timm"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat()
        if (
            (hasattr(os, "getuid") and owner.st_uid != os.getuid())
            or owner.st_mode & 0o022
            or not os.access(folder, os.W_OK)
        ):
            raise PermissionError(f"{folder} is another user's, or others may write to it")
    except (OSError, RuntimeError):  # what is loaded must be what was compiled; a folder of this process's own then
        folder = Path(tempfile.mkdtemp(prefix="dg_timm-"))
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            built = Path(beside) / name
            command = [*compiler, *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(command)}: {done.stderr or done.returncode}")
            os.replace(built, library)  # several processes may compile; each puts a whole file in place
    return library


def _processor() -> bytes:
    """What ``-march=native`` depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    described = sorted(
        {line for line in lines if line.split("\t")[0].strip() in ("flags", "Features", "model name", "CPU part")}
    )
    return "\n".join([platform.machine(), *(described or [platform.processor()])]).encode()
