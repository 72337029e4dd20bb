"""Which rows form a batch, and what an image becomes.

Both are pure functions of the seed, the epoch and the row: the number of workers, the number of processes and a resume
change neither. The main process of every rank draws up batches of keys (with the undecoded row, if it is streamed), and
workers decode and augment what the keys name.
"""

import atexit
import queue
import random
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional, Union

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image as Pillow
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dg_timm.training.data.sources import Split

Position = dict[str, int]  # where in an epoch a process is; JSON
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Key(NamedTuple):
    """One row to read, in one epoch."""

    epoch: int
    shard: int  # 0 unless streamed
    row: int  # within the shard
    copy: int = 0  # of repeated augmentation
    example: Optional[dict[str, Any]] = None  # the row, if it is streamed


class Batch(NamedTuple):
    """A batch of fixed size.

    Attributes:
        images: (batch, channels, height, width) float32, normalised.
        labels: (batch,) int64.
        weights: (batch,) float32; 0 for a row that only fills the batch up, otherwise 1.
        rows: (batch, 2) int64: shard and row.
        unreadable: a line for every row whose image can't be decoded.
        faults: a line for every row with a label that is no class.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    rows: Tensor
    unreadable: list[str]
    faults: list[str]

    def without_weight(self) -> "Batch":
        """The same images, none of which counts."""
        return self._replace(weights=torch.zeros_like(self.weights), unreadable=[], faults=[])

    def on(self, device: torch.device, layout: torch.memory_format) -> "Batch":
        """The same batch on a device, its images in a memory layout."""
        moved: Batch = send_to_device(self, device, non_blocking=True)
        return moved._replace(images=moved.images.contiguous(memory_format=layout))


class Share(NamedTuple):
    """This process among all."""

    process: int = 0
    processes: int = 1


ONE = Share()


class IndexOrder:
    """Batches of a data set that can be indexed.

    The epoch's order is cut into chunks of ``batch_size``; chunk c goes to process c modulo their number. So the rows
    of an update depend only on its number of images, not on the number of processes that share it.

    Args:
        size: rows.
        batch_size: of one process.
        multiple: rows are used up to a multiple of this (those of an update); 1 keeps all, with a short last batch.
        repeats: copies of every row in an epoch, each augmented on its own (Hoffer et al., 2020); the length stays.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        share: Share = ONE,
        *,
        shuffle: bool = False,
        seed: int = 0,
        multiple: int = 1,
        repeats: int = 1,
    ) -> None:
        self.batch_size, self.share, self.shuffle, self.seed, self.repeats = batch_size, share, shuffle, seed, repeats
        self.size, self.used = size, size // multiple * multiple

    def batches(self, epoch: int, position: Optional[Position] = None) -> Iterator[tuple[list[Key], Position]]:
        """This process's batches from ``position`` on, each with the position after it."""
        order = (
            np.random.default_rng([self.seed, epoch]).permutation(self.size) if self.shuffle else np.arange(self.size)
        )
        rows, copies = np.repeat(order, self.repeats), np.tile(np.arange(self.repeats), self.size)
        together = self.batch_size * self.share.processes  # images that all processes take at once
        first = (position["images"] if position else 0) // together
        chunks = range(self.share.process, -(-self.used // self.batch_size), self.share.processes)
        for count, chunk in enumerate(chunks[first:], start=first + 1):
            at = range(chunk * self.batch_size, min((chunk + 1) * self.batch_size, self.used))
            yield [Key(epoch, 0, int(rows[k]), int(copies[k])) for k in at], {"images": count * together}


class StreamOrder:
    """Batches of a streamed data set, whose shards are dealt out to the processes.

    Every row of a shard goes to one process, and is read by it alone; only where there are fewer shards than processes,
    all read them and each keeps its part of the rows. Shards are shuffled, and so are rows within windows of ``buffer``
    rows: a resume reads on from the start of a window. At most three windows are in memory.
    """

    def __init__(
        self,
        rows: Any,
        batch_size: int,
        share: Share = ONE,
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer: int = 2048,
    ) -> None:
        self.rows, self.batch_size, self.share, self.shuffle, self.seed = rows, batch_size, share, shuffle, seed
        self.buffer = buffer

    def batches(self, epoch: int, position: Optional[Position] = None) -> Iterator[tuple[list[Key], Position]]:
        processes = self.share.processes
        position = position or {"shard": 0, "row": 0, "window": 0, "offset": 0, "processes": processes}
        if position["processes"] != processes:
            raise ValueError(
                f"this epoch of a stream was begun by {position['processes']} processes, which dealt its shards out "
                f"among them; go on with as many, not {processes}, or from a checkpoint at an epoch's end"
            )
        start, offset, batch = dict(position), position["offset"], []
        windows = read_ahead(self._windows(epoch, position["shard"], position["row"]))
        for number, (shard, row, keys) in enumerate(windows, start=position["window"]):
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch, self.share.process, number]).permutation(len(keys))
                keys = [keys[k] for k in order]
            for at in range(offset, len(keys)):
                batch.append(keys[at])
                if len(batch) == self.batch_size:
                    yield batch, position | {"shard": shard, "row": row, "window": number, "offset": at + 1}
                    batch = []
            start, offset = position | {"shard": shard, "row": row, "window": number, "offset": len(keys)}, 0
        if batch:
            yield batch, start

    def _windows(self, epoch: int, first_shard: int, first_row: int) -> Iterator[tuple[int, int, list[Key]]]:
        """(place in the process's shards, row, keys): consecutive rows, and where the first of them lies."""
        count = self.rows.num_shards
        shards = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        process, processes = self.share
        own, step = (shards[process::processes], 1) if count >= processes else (shards, processes)
        window: list[Key] = []
        begin = (first_shard, first_row)
        for place in range(first_shard, len(own)):
            shard = int(own[place])
            start = first_row if place == first_shard else 0
            rows = self.rows.shard(num_shards=count, index=shard)
            for row, example in enumerate(rows.skip(start) if start else rows, start=start):
                if len(window) == self.buffer:
                    yield *begin, window
                    window, begin = [], (place, row)
                if row % step == (process if step > 1 else 0):
                    window.append(Key(epoch, shard, row, 0, example))
        if window:
            yield *begin, window


def read_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, the next one being made in a thread while the last one is used."""
    ready: queue.Queue[tuple[Any, Optional[BaseException]]] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item: Any, error: Optional[BaseException] = None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()


class Unreadable(NamedTuple):
    where: str


class Images(Dataset[Any]):
    """Decodes and transforms the rows of a split, in a worker.

    Args:
        split: from :func:`dg_timm.training.data.sources.load_splits`.
        transform: PIL image -> (channels, height, width) tensor, from ``timm.data.create_transform``.
        label_names: one for each class.
        seed: of the augmentation; None if ``transform`` is not random.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable[[Any], Tensor],
        label_names: Sequence[str],
        *,
        channels: int = 3,
        seed: Optional[int] = None,
    ) -> None:
        self.split, self.transform, self.seed = split, transform, seed
        self.classes = len(label_names)
        self.class_of = {name: k for k, name in enumerate(label_names)}
        self.mode = _MODES[channels]
        self.decoder = datasets.Image()

    def __getitem__(self, key: Key) -> Union[tuple[Tensor, int, Key], Unreadable, str]:
        example = self.split.rows[key.row] if key.example is None else key.example
        value, label = example["image"], example["label"]
        path = value.get("path") if isinstance(value, dict) else None
        shard = f" of shard {key.shard}" if key.example is not None else ""
        row = key.row if key.example is not None else self.split.place(key.row)
        where = f"row {row}{shard} of {self.split.name}" + (f" ({path})" if path else "")
        if isinstance(label, str):
            label = self.class_of.get(label, label)
        if not isinstance(label, int) or not 0 <= label < self.classes:
            return f"{where} has the label {label!r}, outside 0..{self.classes - 1}"
        try:
            image = self.decoder.decode_example(value).convert(self.mode)
        except (OSError, SyntaxError, ValueError, TypeError, Pillow.DecompressionBombError) as error:
            return Unreadable(f"{where}: {error or type(error).__name__}")
        if self.seed is None:
            return self.transform(image), label, key
        with seeded(self.seed, key.epoch, key.shard, key.row, key.copy):
            return self.transform(image), label, key


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators for the ``with`` block, and put them back after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # not torch.manual_seed: it reseeds accelerators as well, or keeps a stack trace for each call to do so later
    torch.random.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Collate:
    """Rows -> :class:`Batch`, filled up to a fixed size: shapes stay for a compiler, and so does rounding.

    Args:
        image_size: (channels, height, width).
    """

    def __init__(self, batch_size: int, image_size: tuple[int, int, int]) -> None:
        self.batch_size, self.image_size = batch_size, image_size

    def __call__(self, rows: list[Any]) -> Batch:
        good = [row for row in rows if type(row) is tuple]
        shown = [good[k % len(good)] for k in range(self.batch_size)] if good else []
        weights = torch.zeros(self.batch_size)
        weights[: len(good)] = 1.0
        return Batch(
            torch.stack([row[0] for row in shown]) if good else torch.zeros(self.batch_size, *self.image_size),
            torch.tensor([row[1] for row in shown] or [0] * self.batch_size),
            weights,
            torch.tensor([[row[2].shard, row[2].row] for row in shown] or [[-1, -1]] * self.batch_size),
            [row.where for row in rows if isinstance(row, Unreadable)],
            [row for row in rows if isinstance(row, str)],
        )


def sample_images(loader: "Loader", size: int) -> Tensor:
    """(about size, channels, height, width): images of :class:`Images`, from all over the split."""
    return torch.stack([row[0] for row in loader.sample(size)])


@contextmanager
def _signals_left_to_this_process() -> Iterator[None]:
    """Processes started inside inherit SIGTERM and SIGINT blocked, from their first instruction on.

    A scheduler and Ctrl-C signal the whole process group, and this process still needs batches to stop in good order.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows has no groups to signal
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close(loader: "weakref.ref[Loader]") -> None:
    left = loader()
    if left is not None:
        left.close()


class _Keys:
    """The batch sampler of a DataLoader, which notes the position of every batch that it hands out."""

    def __init__(self, order: Union[IndexOrder, StreamOrder]) -> None:
        self.order = order
        self.epoch = 0
        self.start: Optional[Position] = None
        self.positions: deque[Position] = deque()

    def __iter__(self) -> Iterator[list[Key]]:
        self.positions.clear()
        for keys, position in self.order.batches(self.epoch, self.start):
            self.positions.append(position)
            yield keys


class Loader:
    """Batches of one process, epoch by epoch.

    Args:
        order: which rows.
        images: what they become.
        collate: batches of them; of no rows, one in which nothing counts.
        workers: processes that decode; 0 decodes in this one.
        on_bad_image: ``error``, or ``skip`` to count them in ``skipped`` and report them through ``report``.
    """

    def __init__(
        self,
        order: Union[IndexOrder, StreamOrder],
        images: Dataset[Any],
        collate: Callable[[list[Any]], Any],
        *,
        workers: int = 0,
        pin_memory: bool = False,
        on_bad_image: str = "error",
        report: Callable[[str], None] = print,
    ) -> None:
        self.order, self.images, self.collate = order, images, collate
        self.on_bad_image, self.report, self.skipped = on_bad_image, report, 0
        self.position: Optional[Position] = None  # after the batch last handed out
        self._keys = _Keys(order)
        self._loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # of its own: drawing from torch's would make a resume another run
        )
        # Python ends what is left of them with SIGTERM, which they don't hear, and would wait for ever
        atexit.register(_close, weakref.ref(self))

    def close(self) -> None:
        """End the workers; a later epoch needs another Loader."""
        running = self._loader._iterator
        if running is not None:
            running._shutdown_workers()  # type: ignore[attr-defined]

    def epoch(self, epoch: int, position: Optional[Position] = None) -> Iterator[Any]:
        """The batches of an epoch, from ``position`` on."""
        self._keys.epoch, self._keys.start, self.position = epoch, position, position
        with _signals_left_to_this_process():
            batches = iter(self._loader)
        for batch in batches:
            self.position = self._keys.positions.popleft()
            if batch.faults:
                raise ValueError("; ".join(batch.faults[:8]))
            if batch.unreadable and self.on_bad_image == "error":
                raise ValueError(
                    f"unreadable image in {'; '.join(batch.unreadable[:8])} (--on-bad-image skip leaves it out)"
                )
            self.skipped += len(batch.unreadable)
            for line in batch.unreadable:
                self.report(f"skipped an unreadable image, {line}")
            yield batch

    def sample(self, size: int) -> list[Any]:
        """About ``size`` rows whose images can be read, from all over the split (the first ones, if it is streamed)."""
        split = self.images.split  # type: ignore[attr-defined]
        keys: Iterable[Key]
        if split.streamed:
            keys = (Key(0, 0, row, 0, example) for row, example in enumerate(split.rows.take(size)))
        else:
            keys = [Key(0, 0, int(row)) for row in np.unique(np.linspace(0, len(split.rows) - 1, size).astype(int))]
        rows = [self.images[key] for key in keys]
        return [row for row in rows if type(row) is tuple]

    def nothing(self) -> Any:
        """A batch in which no image counts."""
        return self.collate([])
