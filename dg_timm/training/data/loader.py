"""Hand out the batches of an epoch from worker processes, and remember the position after each."""

import atexit
import functools
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dg_timm._compat import end_loader_workers
from dg_timm._errors import BadValue
from dg_timm.training.data.samplers import MapSampler, Position, SampleKey, StreamSampler

_MAX_LINES_SHOWN = 8


class Loader:
    """Batches of one process, epoch by epoch.

    Args:
        sampler: decides which rows form a batch.
        images: data set of the rows, by :class:`dg_timm.training.data.samplers.SampleKey`.
        collate: makes a batch of the items of ``images``; of no items, a batch in which nothing counts.
        workers: number of processes that decode; 0 decodes in this one.
        pin_memory: copy batches to page-locked memory, from which a GPU fetches faster.
        on_bad_image: ``error`` raises; ``skip`` counts bad rows in ``skipped`` and reports them.
        report: is called with a line for every row that is skipped.
    """

    def __init__(
        self,
        sampler: MapSampler | StreamSampler,
        images: Dataset[Any],
        collate: Callable[[list[Any]], Any],
        *,
        workers: int = 0,
        pin_memory: bool = False,
        on_bad_image: str = "error",
        report: Callable[[str], None] = print,
    ) -> None:
        self.sampler, self.images, self.collate = sampler, images, collate
        self.on_bad_image, self.report, self.skipped = on_bad_image, report, 0
        self.position: Position | None = None  # after the batch last handed out
        self._keys = _KeySampler(sampler)
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
        # At its exit Python ends the workers that are left with SIGTERM, which they block, and would wait for ever.
        at_exit = functools.partial(_close, weakref.ref(self))
        atexit.register(at_exit)
        weakref.finalize(self, atexit.unregister, at_exit)

    def close(self) -> None:
        """End the workers; a later epoch needs another Loader."""
        end_loader_workers(self._loader)

    def epoch(self, epoch: int, position: Position | None = None) -> Iterator[Any]:
        """Yield the batches of an epoch after ``position``.

        Raises:
            BadValue: for a row whose label is no class and for an unreadable image, unless those are skipped.
        """
        self._keys.epoch, self._keys.start, self.position = epoch, position, position
        with _block_stop_signals():
            batches = iter(self._loader)
        for batch in batches:
            self.position = self._keys.positions.popleft()
            if self.on_bad_image == "error":
                _refuse(batch)
            self.skipped += len(batch.unreadable) + len(batch.row_errors)
            for line in batch.unreadable:
                self.report(f"skipped an unreadable image, {line}")
            for line in batch.row_errors:
                self.report(f"skipped a row: {line}")
            yield batch

    def sample_rows(self, size: int) -> list[Any]:
        """Read about ``size`` rows from all over the split; of a stream, the first ones.

        Returns:
            the items of ``images`` that can be read.
        """
        split = self.images.split  # type: ignore[attr-defined]
        keys: Iterable[SampleKey]
        if split.streamed:
            keys = (SampleKey(0, 0, row, 0, example) for row, example in enumerate(split.rows.take(size)))
        else:
            places = np.unique(np.linspace(0, len(split.rows) - 1, size).astype(int))
            keys = [SampleKey(0, 0, int(row)) for row in places]
        rows = [self.images[key] for key in keys]
        return [row for row in rows if type(row) is tuple]

    def empty_batch(self) -> Any:
        """Return a batch in which no image counts."""
        return self.collate([])


def _refuse(batch: Any) -> None:
    advice = "(--on-bad-image skip leaves it out)"
    if batch.row_errors:
        raise BadValue(f"{'; '.join(batch.row_errors[:_MAX_LINES_SHOWN])} {advice}")
    if batch.unreadable:
        raise BadValue(f"unreadable image in {'; '.join(batch.unreadable[:_MAX_LINES_SHOWN])} {advice}")


def sample_images(loader: Loader, size: int) -> Tensor:
    """Stack about ``size`` images from all over a split: (about size, channels, height, width)."""
    return torch.stack([row[0] for row in loader.sample_rows(size)])


class _KeySampler:
    """The batch sampler of a DataLoader; it notes the position of every batch that it hands out."""

    def __init__(self, sampler: MapSampler | StreamSampler) -> None:
        self.sampler = sampler
        self.epoch = 0
        self.start: Position | None = None
        self.positions: deque[Position] = deque()

    def __iter__(self) -> Iterator[list[SampleKey]]:
        self.positions.clear()
        for keys, position in self.sampler.batches(self.epoch, self.start):
            self.positions.append(position)
            yield keys


@contextmanager
def _block_stop_signals() -> Iterator[None]:
    """Let processes that are started inside inherit SIGTERM and SIGINT blocked, from their first instruction on.

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
