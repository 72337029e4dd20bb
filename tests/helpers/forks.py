"""Run a program many times with little: one process imports everything, and each run is a fork of it."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.scripts import python

# Nothing is computed before the forks: they find no kernels, no threads and no folder of a cache.
_FORKS = """
import json, os, sys, traceback
import dg_timm, timm, torch
from dg_timm.execution import operators
task = json.loads(open(sys.argv[1], encoding="utf-8").read())

def child(k, variables):
    os.environ.update(variables)
    sys.stdout = sys.stderr = open(f"{task['output']}/{k}.txt", "w", encoding="utf-8")
    try:
        exec(task["program"], {})
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(0)

started = []
for k, variables in enumerate(task["variables"]):
    started.append(os.fork())
    if started[-1] == 0:
        child(k, variables)
    if not task["at_once"]:
        os.waitpid(started.pop(), 0)
for process in started:
    os.waitpid(process, 0)
"""


def fork_each(program: str, variables: list[Mapping[str, str]], folder: Path, at_once: bool = False) -> list[str]:
    """Run a program in one fresh fork for each set of environment variables, and give what each wrote.

    Args:
        program: Python code.
        variables: on top of the environment, of each fork.
        folder: for the files of this call; made, and new for each call.
        at_once: whether all forks run at the same time, rather than one after another.
    """
    folder.mkdir(parents=True)
    task = folder / "task.json"
    text = json.dumps(dict(program=program, variables=variables, output=str(folder), at_once=at_once))
    task.write_text(text, encoding="utf-8")
    done = python("-c", _FORKS, task)
    assert done.returncode == 0, done.stderr
    return [(folder / f"{k}.txt").read_text(encoding="utf-8").strip() for k in range(len(variables))]
