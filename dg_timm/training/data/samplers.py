"""Decide which rows form a batch.

The decision is a pure function of the seed, the epoch and the position: the number of workers, the number of processes
and a resume don't change it. Every process draws up its own batches of keys (with the undecoded row of a stream).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dg_timm._errors import BadState
from dg_timm.training.data.prefetch import read_ahead

Position = dict[str, int]  # where in an epoch a process is; stored as JSON


class SampleKey(NamedTuple):
    """Name one row to read in one epoch.

    Attributes:
        epoch: counted from 0.
        shard: number of the shard; 0 unless the data set is streamed.
        row: number of the row within the shard.
        copy: number of the copy, where repeated augmentation shows a row several times.
        example: the row itself, if the data set is streamed.
    """

    epoch: int
    shard: int
    row: int
    copy: int = 0
    example: dict[str, Any] | None = None


class Rank(NamedTuple):
    """The number of this process, and how many there are."""

    process: int = 0
    world_size: int = 1


SINGLE = Rank()


class MapSampler:
    """Batches of a data set that can be indexed.

    The epoch's order is cut into chunks of ``batch_size``; process r takes every chunk c with c modulo ``world_size``
    equal to r. So the rows of an update depend only on its number of images, not on how many processes share it.

    Args:
        size: number of rows in the data set.
        batch_size: number of rows in a batch of one process.
        rank: this process.
        shuffle: draw another order in every epoch.
        seed: of the orders.
        multiple: use rows up to a multiple of this number (the images of an update); 1 uses all rows, and the last
            batch may be short.
        repeats: number of copies of every row in an epoch, each augmented on its own (Hoffer et al., 2020). The length
            of an epoch stays the same.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        rank: Rank = SINGLE,
        *,
        shuffle: bool = False,
        seed: int = 0,
        multiple: int = 1,
        repeats: int = 1,
    ) -> None:
        self.batch_size, self.rank, self.shuffle, self.seed, self.repeats = batch_size, rank, shuffle, seed, repeats
        self.size, self.used = size, size // multiple * multiple

    def batches(self, epoch: int, position: Position | None = None) -> Iterator[tuple[list[SampleKey], Position]]:
        """Yield this process's batches after ``position``, each with the position after it."""
        order = np.arange(self.size)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        rows, copies = np.repeat(order, self.repeats), np.tile(np.arange(self.repeats), self.size)
        together = self.batch_size * self.rank.world_size  # images that all processes take at once
        first = (position["images"] if position else 0) // together
        chunks = range(self.rank.process, -(-self.used // self.batch_size), self.rank.world_size)
        for count, chunk in enumerate(chunks[first:], start=first + 1):
            at = range(chunk * self.batch_size, min((chunk + 1) * self.batch_size, self.used))
            yield [SampleKey(epoch, 0, int(rows[k]), int(copies[k])) for k in at], {"images": count * together}


class StreamSampler:
    """Batches of a streamed data set whose shards are dealt out to the processes.

    One process reads a shard, and nobody else does; only where there are fewer shards than processes, all processes
    read all shards, and each keeps its part of the rows. Shards are shuffled, and so are rows within windows of
    ``buffer`` rows: a resume reads on from the start of a window. At most three windows are in memory.

    The shuffle buffer of ``datasets`` is not used: its ``state_dict`` does not hold the buffer, so that a resumed
    stream loses the rows that were in it. Here a resumed epoch gives the same batches as an uninterrupted one.

    Args:
        rows: a ``datasets.IterableDataset``.
        batch_size: number of rows in a batch of one process.
        rank: this process.
        shuffle: draw another order in every epoch.
        seed: of the orders.
        buffer: number of undecoded rows that are shuffled together.
    """

    def __init__(
        self,
        rows: Any,
        batch_size: int,
        rank: Rank = SINGLE,
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer: int = 2048,
    ) -> None:
        self.rows, self.batch_size, self.rank, self.shuffle, self.seed = rows, batch_size, rank, shuffle, seed
        self.buffer = buffer

    def batches(self, epoch: int, position: Position | None = None) -> Iterator[tuple[list[SampleKey], Position]]:
        """Yield this process's batches after ``position``, each with the position after it.

        Raises:
            BadState: if another number of processes began the epoch.
        """
        processes = self.rank.world_size
        position = position or {"shard": 0, "row": 0, "window": 0, "offset": 0, "processes": processes}
        if position["processes"] != processes:
            raise BadState(
                f"{position['processes']} processes began this epoch of a stream and dealt its shards out among them; "
                f"go on with as many, not {processes}, or from a checkpoint at the end of an epoch"
            )
        start, offset, batch = dict(position), position["offset"], []
        windows = read_ahead(self._windows(epoch, position["shard"], position["row"]))
        for number, (shard, row, keys) in enumerate(windows, start=position["window"]):
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch, self.rank.process, number]).permutation(len(keys))
                keys = [keys[k] for k in order]
            for at in range(offset, len(keys)):
                batch.append(keys[at])
                if len(batch) == self.batch_size:
                    yield batch, position | {"shard": shard, "row": row, "window": number, "offset": at + 1}
                    batch = []
            start, offset = position | {"shard": shard, "row": row, "window": number, "offset": len(keys)}, 0
        if batch:
            yield batch, start

    def _windows(self, epoch: int, first_shard: int, first_row: int) -> Iterator[tuple[int, int, list[SampleKey]]]:
        """Yield (place among the process's shards, row, keys): consecutive rows, and where the first of them lies."""
        count = self.rows.num_shards
        shards = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        process, processes = self.rank
        own, step = (shards[process::processes], 1) if count >= processes else (shards, processes)
        window: list[SampleKey] = []
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
                    window.append(SampleKey(epoch, shard, row, 0, example))
        if window:
            yield *begin, window
