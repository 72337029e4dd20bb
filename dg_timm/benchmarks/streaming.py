"""What memory a training holds while it streams its data."""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from PIL import Image

from dg_timm._errors import BadState
from dg_timm._files import atomic_path

_INTERVAL_SECONDS = 0.5
_VAL_IMAGES = 64
_CLASSES = 10


class Reading(NamedTuple):
    """How much memory all processes of a training held: ``mib``, ``seconds`` after the first reading."""

    seconds: float
    mib: float


def measure_memory(args: argparse.Namespace) -> None:
    """Train over a stream, watch the memory, and print what it was as a line of JSON.

    Raises:
        BadState: if the training fails; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        size = write_shards(Path(folder) / "train", args.images, args.shards)
        write_shards(Path(folder) / "val", _VAL_IMAGES, 1)
        command = [sys.executable, "-m", "dg_timm.cli.train",
                   "--data", f"{folder}/train", "--val-data", f"{folder}/val", "--streaming",
                   "--num-classes", str(_CLASSES), "--epoch-size", str(args.images), "--model", "dg_test_resnet",
                   "--image-size", "64", "--epochs", str(args.epochs), "--workers", str(args.workers),
                   "--shuffle-buffer", str(args.buffer), "--output", f"{folder}/run"]  # fmt: skip
        with subprocess.Popen(command, stdout=sys.stderr) as training:
            readings = watch(training)
    if training.returncode != 0:
        raise BadState(f"the training failed (exit status {training.returncode})")
    figures = {"data": size / 2**20, **summarize(readings)}
    rounded = {f"{name}_mib": round(value) for name, value in figures.items()}
    print(json.dumps({"images": args.images, "epochs": args.epochs, **rounded}))
    if args.plot:
        streamed = f"{args.epochs} x {size / 2**20:.0f} MiB streamed"
        draw_readings(readings, args.plot, f"{args.epochs} x {args.images} images, {streamed}")


def write_shards(folder: Path, images: int, shards: int) -> int:
    """Write webdataset shards of random 256 x 256 JPEG files; give the number of bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:04}.tar", "w") as tar:
            for k in range(shard, images, shards):
                coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
                stream = io.BytesIO()
                coarse.resize((256, 256)).save(stream, "JPEG", quality=90)
                for suffix, data in (("jpg", stream.getvalue()), ("cls", str(k % _CLASSES).encode())):
                    entry = tarfile.TarInfo(f"{k:08}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return sum(file.stat().st_size for file in folder.iterdir())


def watch(training: "subprocess.Popen[bytes]") -> list[Reading]:
    """Read the memory of a process and its children until it ends."""
    readings: list[Reading] = []
    start, process = time.perf_counter(), psutil.Process(training.pid)
    while training.poll() is None:
        try:
            family = (process, *process.children(recursive=True))
        except psutil.NoSuchProcess:
            break
        total_kib = sum(_anonymous_kib(member.pid) for member in family)
        readings.append(Reading(time.perf_counter() - start, total_kib / 1024))
        time.sleep(_INTERVAL_SECONDS)
    training.wait()
    return readings


def summarize(readings: list[Reading]) -> dict[str, float]:
    """Give the peak, and the medians of the first and last quarter of the time between start and end, in MiB."""
    middle = [reading.mib for reading in readings[len(readings) // 4 : -(len(readings) // 8) or None]]
    quarter = max(1, len(middle) // 4)
    return {
        "peak": max(reading.mib for reading in readings),
        "first_quarter": statistics.median(middle[:quarter]),
        "last_quarter": statistics.median(middle[-quarter:]),
    }


def _anonymous_kib(pid: int) -> int:
    """A process's own and shared memory, not that of files; pages that processes share are divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def draw_readings(readings: list[Reading], file: Path, title: str) -> None:
    """Draw memory over time, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot(*zip(*readings, strict=True), color="0.2")
    axis.set(title=title, xlabel="seconds", ylabel="memory of all processes (MiB)", ylim=(0, None))
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png")
