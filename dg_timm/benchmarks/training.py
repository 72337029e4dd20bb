"""What the training loop costs, beside a plain loop, and what memory it holds while it streams.

    python train_scripts/measure_training.py throughput --models tf_efficientnet_lite0 dg_tf_efficientnet_lite0
    python train_scripts/measure_training.py memory --plot results/memory.png

throughput: updates of the trainer and of a hand-written loop take turns (A B A B ...) over one network and one loader.
memory: epochs over streamed webdataset shards (written first, to a temporary folder); the resident memory of the
process and its workers is read twice a second.
"""

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import nn

from dg_timm.cli import train as script
from dg_timm.training.loop.distributed import StopRequest, make_accelerator
from dg_timm.training.loop.optimization import split_batch
from dg_timm.training.run.session import assemble


def throughput(args: argparse.Namespace) -> None:
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--model", name, "--image-size", str(args.image_size), "--batch-size", str(args.batch_size),
                       "--opt", "adamw", "--lr", "1e-4", "--channels-last", "--workers", str(args.workers),
                       "--data", args.data, "--output", f"{folder}/run"]  # fmt: skip
            own, accelerator = script.parse(options), make_accelerator()
            split = split_batch(own.batch_size, accelerator.num_processes, own.micro_batch)
            trainer = assemble(own, accelerator, StopRequest(), script.build(own, accelerator, split), split)
        print(json.dumps({"model": name, **compare(trainer, args.rounds, args.updates)}), flush=True)


def compare(trainer: Any, rounds: int, updates: int) -> dict[str, Any]:
    """Images a second of the trainer and of a plain loop: medians over rounds, and the ratio with its spread."""

    def endless() -> Any:
        for epoch in range(10**6):
            yield from trainer.loader.epoch(epoch)

    batches, model, optimizer = endless(), trainer.model.train(), trainer.optimizer
    loss_fn = nn.CrossEntropyLoss()

    def plain() -> None:
        batch = next(batches)
        images = batch.images.to(trainer.accelerator.device, memory_format=torch.channels_last)
        loss = loss_fn(model(images), batch.labels.to(trainer.accelerator.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    def ours() -> None:
        trainer.update(batches)
        trainer.look()  # as with --log-every 1: the plain loop looks at its loss each time, too

    rates: dict[str, list[float]] = {"trainer": [], "plain": []}
    for number in range(rounds + 1):
        pairs = [("trainer", ours), ("plain", plain)]
        for name, step in pairs if number % 2 else reversed(pairs):
            start = time.perf_counter()
            for _ in range(updates):
                step()
            if number:  # the first round warms up
                images = updates * trainer.plan.split.images
                rates[name].append(images / (time.perf_counter() - start))
    ratios = sorted(a / b for a, b in zip(rates["trainer"], rates["plain"], strict=True))
    return {
        **{f"{name}_images_per_second": round(statistics.median(values), 2) for name, values in rates.items()},
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.75])],
        "rounds": rounds,
        "updates_a_round": updates,
        "threads": torch.get_num_threads(),
    }


def memory(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = write_shards(Path(folder) / "train", args.images, args.shards)
        write_shards(Path(folder) / "val", 64, 1)
        options = ["--data", f"{folder}/train", "--val-data", f"{folder}/val", "--streaming", "--num-classes", "10",
                   "--epoch-size", str(args.images), "--model", "dg_test_resnet", "--image-size", "64",
                   "--epochs", str(args.epochs),
                   "--workers", str(args.workers), "--shuffle-buffer", str(args.buffer),
                   "--output", f"{folder}/run"]  # fmt: skip
        readings: list[tuple[float, float]] = []
        done = threading.Event()
        watcher = threading.Thread(target=watch, args=(readings, done))
        watcher.start()
        sys.argv = ["train.py", *options]
        try:
            code = script.main()
        finally:
            done.set()
            watcher.join()
    if code != 0:
        raise SystemExit(code)
    middle = [mib for _, mib in readings[len(readings) // 4 : -len(readings) // 8]]
    first, last = (statistics.median(part) for part in (middle[: len(middle) // 4], middle[-len(middle) // 4 :]))
    figures = {
        "data": size / 2**20,
        "peak": max(mib for _, mib in readings),
        "first_quarter": first,
        "last_quarter": last,
    }
    print(
        json.dumps(
            {
                "images": args.images,
                "epochs": args.epochs,
                **{f"{name}_mib": round(value) for name, value in figures.items()},
            }
        )
    )
    if args.plot:
        draw(
            readings,
            args.plot,
            f"{args.epochs} x {args.images} images, {args.epochs} x {size / 2**20:.0f} MiB streamed",
        )


def write_shards(folder: Path, images: int, shards: int) -> int:
    """Webdataset shards of random 256 x 256 JPEG files; bytes written."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:04}.tar", "w") as tar:
            for k in range(shard, images, shards):
                coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
                stream = io.BytesIO()
                coarse.resize((256, 256)).save(stream, "JPEG", quality=90)
                for suffix, data in (("jpg", stream.getvalue()), ("cls", str(k % 10).encode())):
                    entry = tarfile.TarInfo(f"{k:08}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return sum(file.stat().st_size for file in folder.iterdir())


def watch(readings: list[tuple[float, float]], done: threading.Event) -> None:
    own, start = psutil.Process(), time.perf_counter()
    while not done.wait(0.5):
        total = sum(anonymous(process.pid) for process in (own, *own.children(recursive=True)))
        readings.append((time.perf_counter() - start, total / 1024))


def anonymous(pid: int) -> int:
    """KiB of a process's own and shared memory, not of files; pages that processes share are divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def draw(readings: list[tuple[float, float]], file: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*readings, strict=True), color="0.2")
    axis.set(title=title, xlabel="seconds", ylabel="memory of all processes (MiB)", ylim=(0, None))
    FigureCanvasAgg(figure).print_png(str(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("throughput")
    first.add_argument("--models", nargs="+", default=["tf_efficientnet_lite0", "dg_tf_efficientnet_lite0"])
    first.add_argument("--data", default="digits")
    first.add_argument("--image-size", type=int, default=64)
    first.add_argument("--batch-size", type=int, default=64)
    first.add_argument("--workers", type=int, default=0)
    first.add_argument("--rounds", type=int, default=16)
    first.add_argument("--updates", type=int, default=3, help="of each loop in a round")
    first.set_defaults(run=throughput)
    second = commands.add_parser("memory")
    second.add_argument("--images", type=int, default=20000)
    second.add_argument("--shards", type=int, default=16)
    second.add_argument("--epochs", type=int, default=1)
    second.add_argument("--buffer", type=int, default=1024)
    second.add_argument("--workers", type=int, default=2)
    second.add_argument("--plot", type=Path)
    second.set_defaults(run=memory)
    args = parser.parse_args()
    args.run(args)
