"""Say in words on which hardware a figure was measured."""

import os
import platform
from pathlib import Path

import torch


def describe_hardware(device: torch.device | None = None) -> str:
    """The processor or GPU, threads, and versions: ``"Intel Xeon ... (2 of 2 cores), torch 2.14.1, Python 3.11.7"``."""
    if device is not None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor_name()} ({torch.get_num_threads()} of {os.cpu_count()} cores)"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def processor_name() -> str:
    """What the system calls its processor; its architecture where it has no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
