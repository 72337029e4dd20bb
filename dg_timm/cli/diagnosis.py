"""Check what is installed and what runs here, with a remedy for each fault.

    dg-timm doctor
    dg-timm doctor --json --offline

The exit status is 1 if a check failed; what is merely absent (an extra, a GPU, a token) is no failure.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

import timm
import torch
from huggingface_hub import HfApi, constants, get_token
from packaging.requirements import Requirement

from dg_timm._command_line import CommandParser
from dg_timm._errors import BadState
from dg_timm._hardware import device_name, processor_name
from dg_timm._version import __version__
from dg_timm.cli.errors import cli_errors
from dg_timm.execution import kernels
from dg_timm.models.registry import BUNDLED

GOOD, ABSENT, FAILED = "ok", "absent", "failed"


class Finding(NamedTuple):
    """What a check found: a state (``ok``, ``absent`` or ``failed``), and a remedy if that is not ``ok``."""

    check: str
    state: str
    found: str
    remedy: str = ""


def check_versions(args: argparse.Namespace) -> Iterator[Finding]:
    """Look at Python and at every package that dg-timm declares."""
    yield Finding("python", GOOD, platform.python_version())
    yield Finding("dg-timm", GOOD, __version__)
    try:
        declared = metadata.requires("dg-timm") or []
    except metadata.PackageNotFoundError:
        yield Finding("installation", ABSENT, "not installed, but run from a folder", "pip install .")
        declared = ["torch", "timm", "huggingface_hub", "safetensors"]
    rows = [Requirement(text) for text in declared]
    seen: set[str] = set()
    for row in sorted(rows, key=lambda row: _is_of(row, "detect") + _is_of(row, "plots")):
        extra = next((name for name in ("train", "plots", "detect") if _is_of(row, name)), "")
        if row.name in {"dg-timm", *seen} or not (extra or row.marker is None):
            continue
        seen.add(row.name)
        yield _package(row, extra)


def _is_of(row: Requirement, extra: str) -> bool:
    return row.marker is not None and row.marker.evaluate({"extra": extra})


def _package(row: Requirement, extra: str) -> Finding:
    name = f"{row.name} ({extra})" if extra else row.name
    try:
        version = metadata.version(row.name)
    except metadata.PackageNotFoundError:
        what = f"'dg-timm[{extra}]'" if extra else f"'{row}'"
        return Finding(name, ABSENT if extra else FAILED, "not installed", f"pip install {what}")
    if not row.specifier.contains(version, prereleases=True):
        return Finding(name, FAILED, f"{version}, needs {row.specifier}", f"pip install '{row.name}{row.specifier}'")
    return Finding(name, GOOD, version)


def check_devices(args: argparse.Namespace) -> Iterator[Finding]:
    """Look at the processor and at GPUs."""
    yield Finding("processor", GOOD, f"{processor_name()}, {torch.get_num_threads()} threads")
    found = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    for device in found:
        yield Finding(str(device), GOOD, device_name(device))
    if not found:
        yield Finding("GPU", ABSENT, "none that torch can use", "install a torch with CUDA if there is a GPU")


def check_kernels(args: argparse.Namespace) -> Iterator[Finding]:
    """Compile the kernels of every device."""
    devices = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    for device in devices:
        try:
            status = kernels.compile(device)
            yield Finding(f"kernels on {device}", GOOD, f"{status.backend} ({', '.join(status.dtypes)})")
        except BadState as error:
            yield Finding(f"kernels on {device}", FAILED, str(error), "PyTorch's operations run in their place, slower")


def check_hub(args: argparse.Namespace) -> Iterator[Finding]:
    """Look for a token, which is not shown, and ask the Hub whether it is there."""
    yield Finding("Hub cache", GOOD, constants.HF_HUB_CACHE)
    if get_token():
        yield Finding("Hub token", GOOD, "found")
    else:
        yield Finding("Hub token", ABSENT, "none; publishing needs one", "hf auth login")
    if args.offline or constants.HF_HUB_OFFLINE:
        yield Finding("Hub", ABSENT, "not asked (offline)", "unset HF_HUB_OFFLINE to download weights")
        return
    try:
        HfApi().model_info("timm/resnet18.a1_in1k", timeout=10)
        yield Finding("Hub", GOOD, f"{constants.ENDPOINT} answers")
    except Exception as error:  # whichever client it uses
        said = (str(error).splitlines() or [""])[0]
        yield Finding("Hub", FAILED, f"{constants.ENDPOINT}: {type(error).__name__} {said}"[:160],
                      "check network and proxy, or set HF_HUB_OFFLINE=1 to use what is in the cache")  # fmt: skip


def check_registry(args: argparse.Namespace) -> Iterator[Finding]:
    """Count what timm knows of us."""
    yield Finding("models", GOOD, f"{len(timm.list_models('dg_*'))} dg_* models registered with timm")
    for name, folder in BUNDLED.items():
        sound = (folder / "model.safetensors").is_file()
        remedy = "" if sound else "pip install --force-reinstall dg-timm"
        yield Finding(name, GOOD if sound else FAILED, "ships with the package" if sound else "is missing", remedy)


CHECKS: tuple[Callable[[argparse.Namespace], Iterator[Finding]], ...] = (
    check_versions, check_devices, check_kernels, check_hub, check_registry,
)  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--offline", action="store_true", help="do not ask the Hub")
    parser.add_argument("--json", action="store_true", help="print JSON lines in place of a table")
    return parser.parse_args(argv)


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Check; return the exit status."""
    args = parse(argv)
    findings = [finding for check in CHECKS for finding in check(args)]
    for finding in findings:
        remedy = f"  -> {finding.remedy}" if finding.remedy else ""
        line = f"{finding.state:7} {finding.check}: {finding.found}{remedy}"
        print(json.dumps(finding._asdict()) if args.json else line)
    return 1 if any(finding.state == FAILED for finding in findings) else 0
