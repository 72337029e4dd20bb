"""Run the scripts of train_scripts as users do, in processes of their own, and read the tables that they write."""

import csv
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.helpers import preloaded

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "train_scripts"


def command(script: str, *args: object, processes: int = 1, restarts: int = 0) -> list[str]:
    """The command line of a script of train_scripts (``"train.py"``, ``"experiments/paths.py"``).

    Args:
        args: turned into text.
        processes: above 1, torchrun starts so many of them on this machine.
        restarts: how often torchrun starts all of them again after one died.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--max_restarts", str(restarts),
                     "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]  # fmt: skip
    return [*launcher, str(SCRIPTS / script), *map(str, args)]


def one_thread(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of this process, with one thread for each process that is started, and with ``env`` on top."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}


def run(
    script: str,
    *args: object,
    processes: int = 1,
    timeout: int = 600,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; ``returncode``, ``stdout`` and ``stderr`` tell what came of it.

    A single process is forked from one that has imported everything, where that makes no difference.

    Args:
        script: as in :func:`command`; so are ``args`` and ``processes``.
        timeout: seconds until the script is killed and the test fails.
        env: variables on top of those of this process.
        cwd: folder in which it runs; by default that of this process.
    """
    words = command(script, *args, processes=processes)
    if processes == 1 and preloaded.is_possible(one_thread(env)):
        return preloaded.run_script(words[1:], one_thread(env), cwd, timeout)
    return execute(words, timeout=timeout, env=env, cwd=cwd)


def python(
    *args: object, timeout: int = 600, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python itself in a process of its own: ``python("-c", code)`` or ``python("-m", module, ...)``."""
    return execute([sys.executable, *map(str, args)], timeout=timeout, env=env, cwd=cwd)


def execute(
    words: list[str], *, timeout: int = 600, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run any command line; nothing is raised for its exit status."""
    return subprocess.run(
        words, capture_output=True, encoding="utf-8", env=one_thread(env), cwd=cwd, timeout=timeout, check=False
    )


def rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by the names of its columns."""
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
