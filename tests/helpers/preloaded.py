"""Run scripts as processes of their own, forked from one that has imported everything: that is most of a short run.

A fork is a process like any other: it has its own memory, files, modes, signals and exit status. It differs from a
fresh one in what the imports did, which other tests look at, in fresh processes.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

# The child leaves the loop and goes on at the end of the program, so that it ends as any Python process does. Nothing
# is computed before a fork: it finds no kernels and no threads.
_SERVER = """
import gc, importlib, json, os, runpy, signal, sys, warnings
from pathlib import Path
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in sys.argv[1:]:
        importlib.import_module(name)
gc.freeze()  # a collection would copy the pages of what is shared
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
else:
    sys.exit()
signal.alarm(task["timeout"])
os.environ.clear()
os.environ.update(task["env"])
os.chdir(task["cwd"])
for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, task["out"], os.O_WRONLY), (2, task["err"], os.O_WRONLY)):
    os.dup2(os.open(name, flags), number)
sys.argv = task["words"]
sys.path[0] = str(Path(task["words"][0]).parent)
runpy.run_path(task["words"][0], run_name="__main__")
"""
_IMPORTED = (
    "accelerate", "datasets", "evaluate", "matplotlib.pyplot", "networkx", "psutil", "pycocotools.cocoeval",
    "sklearn.datasets", "torchmetrics",
    "dg_timm", "dg_timm.cli.calibration", "dg_timm.cli.detect", "dg_timm.cli.publish", "dg_timm.cli.train",
    "dg_timm.cli.validate", "dg_timm.training.run.fine_tuning",
)  # fmt: skip


# Variables that an import may have read; but for those that Inductor and scikit-learn set for themselves
_READ_EARLY = re.compile(
    r"(?!TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|KMP_INIT_AT_FORK|KMP_DUPLICATE_LIB_OK)"
    r"((HF|HUGGINGFACE|TORCH|OMP|KMP|MKL|PYTHON|CUDA|TRITON|LD|DG_TIMM|XDG)_?.*|HOME|PATH|TMPDIR)"
)


def is_possible(env: Mapping[str, str]) -> bool:
    """Say whether a fork would be as a fresh process with this environment."""
    base = _start()[1]
    differing = {key for key in {*env, *base} if env.get(key) != base.get(key)}
    return hasattr(os, "fork") and not any(_READ_EARLY.fullmatch(key) for key in differing)


def run_script(
    words: list[str], env: Mapping[str, str], cwd: Path | None, timeout: int
) -> subprocess.CompletedProcess[str]:
    """Run a Python file, the first of ``words``, with the others as its arguments.

    Args:
        env: for which :func:`is_possible` says so.
        cwd: folder in which it runs; by default that of this process.
        timeout: seconds until it is killed.

    Raises:
        TimeoutExpired: after ``timeout``.
    """
    if _start()[0].poll() is not None:  # it was killed
        _start.cache_clear()
    server, _ = _start()
    with (
        tempfile.NamedTemporaryFile("r", encoding="utf-8") as out,
        tempfile.NamedTemporaryFile("r", encoding="utf-8") as err,
    ):
        task = dict(words=words, env=dict(env), cwd=str(cwd or Path.cwd()), out=out.name, err=err.name, timeout=timeout)
        print(json.dumps(task), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        if status == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(words, timeout, out.read(), err.read())
        return subprocess.CompletedProcess(words, status, out.read(), err.read())


def take_environment() -> None:
    """Let forks have the environment of this process as it is now, before a test changes it."""
    _environment.update(os.environ)


_environment: dict[str, str] = {}


@cache
def _start() -> tuple[subprocess.Popen[str], dict[str, str]]:
    """The process that everything is forked from, and its environment."""
    env = {**_environment, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", _SERVER, *_IMPORTED]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=env)
    atexit.register(_stop, server)
    return server, env


def _stop(server: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        server.stdin.close()
    server.kill()
    server.wait()
    server.stdout.close()
