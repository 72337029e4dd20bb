"""Make the next item in a thread while the last one is in use."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

_JOIN_SECONDS = 5.0  # an iterator that waits for the network may not hear that it should stop


def read_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the same items in the same order; an exception of ``items`` is raised where its item would have come."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
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
        thread.join(_JOIN_SECONDS)
