"""Start trainings as processes of their own, and hand them the signals that ask to stop."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRAIN = (sys.executable, "-m", "dg_timm.cli.train")


class Launcher:
    """Runs command lines, each to its end; several threads may do so at once.

    Attributes:
        stopped_by: number of the signal that asked to stop, or None.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, command: Sequence[str], log: Path) -> int:
        """Run a command on one thread, and append what it prints to a file; return its exit status."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("ab") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
            self._running.add(process)
            status = process.wait()
            self._running.discard(process)
        return status

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT reach the trainings, which save and end; then end this process.

        Raises:
            SystemExit: at the end of the ``with`` block, after such a signal.
        """

        def stop(number: int, frame: Any) -> None:
            self.stopped_by = number
            for process in tuple(self._running):
                if number == signal.SIGTERM:  # a terminal sends SIGINT to all of them itself
                    process.send_signal(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
            if self.stopped_by is not None:
                print("stopped; the same command goes on", file=sys.stderr)
                sys.exit(128 + self.stopped_by)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
