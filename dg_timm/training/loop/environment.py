"""Say on what a run ran: versions, commit, hardware and command."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dg_timm._hardware import device_name

_PACKAGES = ("torch", "timm", "dg-timm", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy")
_GIT_SECONDS = 10


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return what environment.json holds. It has no environment variables, which may hold secrets."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def _commit() -> str:
    """Return the commit of the package's checkout, with ``-dirty`` if it was changed; ``unknown`` outside of one."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude",
        "*",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
