"""Peak memory of networks, each in a process of its own: ``python -m dg_timm.benchmarks.peaks`` is that process."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import dg_timm
from dg_timm._errors import BadState
from dg_timm.benchmarks.candidates import create, split_spec, static_name, with_static_networks
from dg_timm.benchmarks.imposed import complete_topology
from dg_timm.benchmarks.memory import check_memory, explain_lack_of_memory, memory_needed
from dg_timm.benchmarks.setting import Row, Setting
from dg_timm.benchmarks.steps import make_step, random_images
from dg_timm.cli.errors import cli_errors

_KILLED = -9  # what the system does to a process that takes too much


def measure_peaks(specs: list[str], setting: Setting, threads: int) -> list[Row]:
    """Measure every network, the static networks of dynamic ones first.

    Raises:
        BadState: naming the network that could not be measured, and why.
    """
    rows: list[Row] = []
    for spec in with_static_networks(specs):
        command = [sys.executable, "-m", "dg_timm.benchmarks.peaks", spec, json.dumps(setting.as_row()), str(threads)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
            killed = " (out of memory?): use a smaller --batch-size" if done.returncode == _KILLED else ""
            raise BadState(f"{spec} could not be measured: {said.removeprefix('error: ')}{killed}")
        row = {"model": spec, **setting.as_row(), **json.loads(done.stdout.splitlines()[-1])}
        static = next((other for other in rows if other["model"] == static_name(spec)), row)
        rows.append({**row, "ratio": round(row["peak_mib"] / static["peak_mib"], 3)})
    return rows


def measure_peak(spec: str, setting: Setting) -> dict[str, float]:
    """Measure the peak over three steps, in MiB: of this process (CPU) or of the allocator (CUDA)."""
    images = random_images(setting)
    execution = split_spec(spec)[1]
    model = create(spec, setting)
    check_memory(spec, memory_needed(model, setting), setting)
    if execution:
        dg_timm.set_execution(model, execution, complete_topology(model) if execution == "fixed" else None)
    before = _resident_mib()
    compiled: Any = torch.compile(model) if setting.compile else model
    step = make_step(compiled, setting, images)
    for _ in range(3):
        step()
    device = setting.torch_device
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _resident_mib()
    return {"before_mib": round(before, 1), "peak_mib": round(peak, 1)}


def _resident_mib() -> float:
    """The most that this process has held so far."""
    try:  # on Linux ru_maxrss outlives exec: it begins with what the parent process held
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    except (OSError, StopIteration):
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@cli_errors
def main(argv: list[str] | None = None) -> int:
    """Measure one network; print a line of JSON. The arguments are its name, a setting as JSON, and threads."""
    spec, setting, threads = sys.argv[1:] if argv is None else argv
    torch.set_num_threads(int(threads))
    with explain_lack_of_memory():
        print(json.dumps(measure_peak(spec, Setting(**json.loads(setting)))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
