"""Say in words on which hardware a figure was measured."""

import os
import platform
from pathlib import Path

import torch


def describe_hardware(device: torch.device | None = None) -> str:
    """The processor or GPU, threads, and versions: ``"Intel Xeon ... (2 of 2 cores), torch 2.14.1, Python 3.11.7"``."""
    if device is not None and device.type == "cuda":
        name = device_name(device)
    else:
        name = f"{processor_name()} ({torch.get_num_threads()} of {os.cpu_count()} cores)"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def device_name(device: torch.device) -> str:
    """What a GPU calls itself; other devices by their torch name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor_name() -> str:
    """What the system calls its processor; its architecture where it has no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def processor_features() -> bytes:
    """What ``-march=native`` depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = ("flags", "Features", "model name", "CPU part")
    described = sorted({line for line in lines if line.split("\t")[0].strip() in names})
    return "\n".join([platform.machine(), *(described or [platform.processor()])]).encode()
