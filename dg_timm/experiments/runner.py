"""Run the trials of an experiment: each is a run of train.py in a folder of its own, done once and never again.

A trial that was interrupted goes on from its last checkpoint. The result of a finished trial is kept as JSON among the
results, and read from there. It is trained again only where another, unfinished trial needs its network. Trials run
side by side, one thread each, so that a trial gives the same figures wherever in the order it runs.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter

import torch

from dg_timm._errors import BadState, BadValue
from dg_timm._hardware import describe_hardware
from dg_timm.experiments.launcher import TRAIN, Launcher
from dg_timm.experiments.store import TrialStore
from dg_timm.experiments.trial import Result, Trial, option_words

_USER_ERROR = 2  # exit status of train.py for options or data that can't be used
_MOST_SHOWN = 500  # letters of an error


def run_trials(
    trials: Sequence[Trial], args: argparse.Namespace, *, networks: bool = False, launcher: Launcher | None = None
) -> list[Result]:
    """Train what is not trained yet.

    Args:
        trials: each after those that it depends on.
        args: options of :func:`dg_timm.experiments.options.parse`.
        networks: train finished trials again, too, whose networks were deleted.
        launcher: starts the trainings.

    Returns:
        the result of every finished trial, in order.

    Raises:
        BadValue: if results are those of other options, data or recipes, or two trials have one name.
        BadState: naming the trials that failed, after all others are done that do not need them. What train.py refuses
            at once ends the experiment.
        SystemExit: after SIGTERM or SIGINT, once the trainings under way have stopped and saved.
    """
    if len({trial.folder for trial in trials}) != len(trials):
        raise BadValue("two trials have one name")
    runner = _Runner(TrialStore(args), launcher or Launcher())
    planned = _plan(trials, runner.store, networks and not args.collect)
    if not args.collect:
        with runner.launcher.listening():
            runner.run(planned, args.jobs)
    if runner.failed:
        lines = (f"{trial.folder} {runner.failed[trial]}" for trial in planned if trial in runner.failed)
        raise BadState("; ".join(lines))
    return [result for trial in trials if (result := runner.store.read(trial)) is not None]


def _plan(trials: Sequence[Trial], store: TrialStore, networks: bool) -> list[Trial]:
    """Choose the trials to train, in order: the unfinished ones, and those whose networks they need."""
    needed = {trial for trial in trials if store.read(trial) is None or (networks and not store.has_network(trial))}
    for trial in reversed(trials):
        if trial in needed:
            needed |= {other for other in trial.depends_on.values() if not store.has_network(other)}
    return [trial for trial in trials if trial in needed]


class _Runner:
    """Trains trials, each once those that it depends on are done.

    Attributes:
        failed: why a trial has no result, by trial.
    """

    def __init__(self, store: TrialStore, launcher: Launcher) -> None:
        self.store, self.launcher = store, launcher
        self.failed: dict[Trial, str] = {}
        self._refused = False  # options or data that no trial can be trained with

    def run(self, trials: Sequence[Trial], jobs: int) -> None:
        """Train all, ``jobs`` side by side."""
        graph = {trial: [other for other in trial.depends_on.values() if other in trials] for trial in trials}
        sorter = TopologicalSorter(graph)
        sorter.prepare()
        running: dict[Future[str], Trial] = {}
        with ThreadPoolExecutor(jobs) as pool:
            while sorter.is_active():
                running |= {pool.submit(self._train, trial): trial for trial in sorter.get_ready()}
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    trial = running.pop(future)
                    if why := future.result():
                        self.failed[trial] = why
                    sorter.done(trial)

    def _train(self, trial: Trial) -> str:
        """Train to the end and keep the result; otherwise say why not."""
        lost = next((other for other in trial.depends_on.values() if other in self.failed), None)
        if lost is not None:
            return f"needs {lost.folder}"
        if self.launcher.stopped_by is not None or self._refused:
            return "was not started"
        folder = self.store.begin(trial)
        log = folder / "log.txt"
        print(f"{trial.folder} begins", flush=True)
        status = self.launcher.run(self._command(trial), log)
        if status != 0:
            self._refused |= status == _USER_ERROR and not (folder / "run" / "summary.csv").exists()
            print(f"{trial.folder} failed ({status})", flush=True)
            said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            last = (said.strip().splitlines() or ["nothing"])[-1]
            return f"failed ({status}): {last[:_MOST_SHOWN]} (all of it: {log})"
        result, same = self.store.finish(trial, _describe_device())
        if same is not None:  # trained again for its network
            print(f"{trial.folder}: {'as before' if same else 'NOT as before: other figures'}", flush=True)
        print(f"{trial.folder}: top-1 {result.figures['eval_top1']:.2f} % after {result.seconds:.0f} s", flush=True)
        return ""

    def _command(self, trial: Trial) -> list[str]:
        options = self.store.given(trial) | {key: self.store.network(o) for key, o in trial.depends_on.items()}
        command = [*TRAIN, "--data", self.store.data, "--output", str(self.store.folder(trial) / "run")]
        command += ["--resume", "auto"]
        for key, value in options.items():
            command += option_words(key, value)
        return command


def _describe_device() -> str:
    return describe_hardware(torch.device("cuda") if torch.cuda.is_available() else None)
