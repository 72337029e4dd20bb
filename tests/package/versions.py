"""Run the contract tests in a new environment: with the oldest releases that pyproject.toml claims, or the newest.

    python -m tests.package.versions floor
    python -m tests.package.versions newest --python python3.13
    python -m tests.package.versions floor --extra detect -- tests/training tests/detection

What follows `--` is for pytest; without it, the contract tests run.
Every ``package>=release`` of pyproject.toml stands for a floor; ``floor`` installs exactly these releases, so that a
claim and what runs can't part. ``newest`` takes what the index has, whatever a constraints file of the machine says.
The environment takes up to 10 GB, and is deleted at the end unless ``--folder`` names it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CONTRACT = (
    "tests/graph",
    "tests/execution",
    "tests/conversion",
    "tests/analysis",
    "tests/budget",
    "tests/models/test_zoo.py",
    "tests/package/test_compat.py",
)
TESTERS = ("pytest", "pytest-timeout")
SHOWN = ("torch", "torchvision", "timm", "huggingface_hub", "numpy", "safetensors")


def requirements(extras: list[str]) -> list[Requirement]:
    """What a user of these extras installs, by pyproject.toml; extras that name other extras are followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, Requirement] = {}
    waiting = [
        *project["dependencies"],
        *(text for extra in extras for text in project["optional-dependencies"][extra]),
    ]
    for text in waiting:  # it grows
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            waiting += [text for extra in requirement.extras for text in project["optional-dependencies"][extra]]
        else:
            found[requirement.name] = requirement
    return list(found.values())


def floor_of(requirement: Requirement) -> str:
    """``package==release`` of the oldest release that a requirement admits."""
    floors = [bound.version for bound in requirement.specifier if bound.operator in (">=", "==", "~=")]
    if len(floors) != 1:
        raise ValueError(f"pyproject.toml: {requirement} names no floor")
    return f"{requirement.name}=={floors[0]}"


def install(python: Path, wanted: list[str]) -> None:
    """Install releases with pip; a cap that this machine puts on releases doesn't count."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", "--disable-pip-version-check", *wanted]
    subprocess.run(command, check=True, env={**os.environ, "PIP_CONSTRAINT": os.devnull})


def show(python: Path) -> None:
    """Print the releases that the tests run with."""
    program = (
        "import sys; from importlib import metadata\n"
        f"print('Python', sys.version.split()[0], *(f'{{n}} {{metadata.version(n)}}' for n in {SHOWN!r}))"
    )
    subprocess.run([str(python), "-c", program], check=True)


def run(which: str, extras: list[str], interpreter: str, folder: Path, pytest_arguments: list[str]) -> int:
    """Make the environment in ``folder`` (or bring the one there up to date) and run pytest in it."""
    wanted = requirements(extras)
    subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pins = [floor_of(requirement) if which == "floor" else requirement.name for requirement in wanted]
    install(python, [*pins, *TESTERS])
    show(python)
    command = [str(python), "-m", "pytest", "-q", *pytest_arguments]
    return subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("floor", "newest"), help="the releases to install")
    parser.add_argument("--extra", action="append", default=[], help="an extra to install, too (default: none)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where the environment lies, and stays (default: a temporary folder)"
    )
    args = parser.parse_args(arguments[:cut])
    with tempfile.TemporaryDirectory(prefix="dg-timm-versions-") as scratch:
        folder = args.folder or Path(scratch, "venv")
        return run(args.which, args.extra, args.python, folder, arguments[cut + 1 :] or list(CONTRACT))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
