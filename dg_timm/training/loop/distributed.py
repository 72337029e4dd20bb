"""What the processes of one training share, and the signals that ask it to stop."""

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs

from dg_timm._errors import BadValue, MissingPackage


def make_accelerator(
    *, mixed_precision: str = "no", compile: bool = False, trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """Set Accelerate up for this machine: for its accelerator, or else for its CPUs, also under torchrun.

    Args:
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        compile: let Accelerate compile the network with Inductor.
        trackers: names of Accelerate's trackers.
        folder: where trackers write.

    Raises:
        BadValue: for a precision that the device does not offer, and for an unknown tracker.
        MissingPackage: for a tracker that is not installed.
    """
    # Without an accelerator it must be told so, or processes under torchrun would each train a network of their own.
    cpu = not torch.accelerator.is_available()
    if mixed_precision == "fp16" and cpu:
        raise BadValue("--mixed-precision fp16 needs a GPU; bf16 runs on CPUs too")
    unknown = [name for name in trackers if name not in LOGGER_TYPE_TO_CLASS]
    if unknown:
        raise BadValue(f"--report-to {unknown[0]}: there are {', '.join(LOGGER_TYPE_TO_CLASS)}")
    missing = sorted(set(trackers) - {str(logger) for logger in get_available_trackers()})
    if missing:
        raise MissingPackage(f"--report-to {' '.join(missing)}: not installed; pip install {' '.join(missing)}")
    return Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        dynamo_backend="inductor" if compile else "no",
        log_with=list(trackers) or None,
        project_dir=str(folder) if folder else None,
        # each process keeps norm statistics of its own until the epoch's end
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


def prepare(accelerator: Accelerator, *parts: Any) -> Any:
    """Call ``accelerator.prepare`` without the warning about an argument that Accelerate itself passes to torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return accelerator.prepare(*parts)


class HostAllReduce:
    """Sum small numbers over all processes through the CPU, so that nobody waits for the accelerator."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None

    def sum(self, *values: float) -> list[float]:
        """Sum each value over the processes; every process must call it."""
        if self._group is None:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Tell whether the value is true in any process; every process must call it."""
        return self.sum(value)[0] > 0


class InterruptFlag:
    """Remember the first SIGTERM or SIGINT in ``signal``; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def is_set(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator["InterruptFlag"]:
        """Handle both signals inside the ``with`` block."""

        def handle(number: int, frame: FrameType | None) -> None:
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


class Processes(NamedTuple):
    """What this process shares with the others of its training.

    Attributes:
        accelerator: Accelerate, which moves gradients.
        all_reduce: sums of small numbers on the host.
        interrupt: whether this process was asked to stop.
    """

    accelerator: Accelerator
    all_reduce: HostAllReduce
    interrupt: InterruptFlag
