"""What the processes of one training must agree on, and the signals that ask it to stop."""

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Optional

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs


def make_accelerator(
    *, mixed_precision: str = "no", compile: bool = False, trackers: Sequence[str] = (), folder: Optional[Path] = None
) -> Accelerator:
    """Accelerate, set up for this machine: its accelerator, or else its CPUs, also under torchrun.

    Raises:
        ValueError: for a precision that the device has not, or a tracker that is not installed.
    """
    # Without an accelerator it must be told so, or processes under torchrun would each train a network of their own.
    cpu = not torch.accelerator.is_available()
    if mixed_precision == "fp16" and cpu:
        raise ValueError("--mixed-precision fp16 needs a GPU; bf16 runs on CPUs too")
    unknown = [name for name in trackers if name not in LOGGER_TYPE_TO_CLASS]
    if unknown:
        raise ValueError(f"--report-to {unknown[0]}: there are {', '.join(LOGGER_TYPE_TO_CLASS)}")
    missing = set(trackers) - {str(logger) for logger in get_available_trackers()}
    if missing:
        raise ValueError(
            f"--report-to {' '.join(sorted(missing))}: not installed; pip install {' '.join(sorted(missing))}"
        )
    # Accelerate passes torch an argument of DDP that torch calls deprecated
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    return Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        dynamo_backend="inductor" if compile else "no",
        log_with=list(trackers) or None,
        project_dir=str(folder) if folder else None,
        # each process keeps norm statistics of its own until the epoch's end
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


class Agreement:
    """Sums of small numbers over all processes, through the CPU: the accelerator is not waited for."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None

    def sum(self, *values: float) -> list[float]:
        """Of each value over the processes; every process must call it."""
        if self._group is None:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Whether it is true in any process; every process must call it."""
        return self.sum(value)[0] > 0


class StopRequest:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: Optional[signal.Signals] = None

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle both signals inside the ``with`` block."""

        def handle(number: int, frame: Optional[FrameType]) -> None:
            if self.signal is not None:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.signal = signal.Signals(number)
            if self.signal == signal.SIGINT:
                os.write(2, b"\nstopping after this update; again to end at once\n")

        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
