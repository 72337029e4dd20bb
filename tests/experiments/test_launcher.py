"""Processes that are started, and the signals that reach them."""

import os
import signal
import sys
import threading
import time

import pytest

from dg_timm.experiments.launcher import Launcher


def test_a_command_runs_on_one_thread_and_its_output_is_appended(tmp_path):
    log, launcher = tmp_path / "log.txt", Launcher()
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); print('err', file=sys.stderr); sys.exit(3)"
    for _ in range(2):
        assert launcher.run([sys.executable, "-c", code], log) == 3
    assert sorted(log.read_text(encoding="utf-8").split()) == ["1", "1", "err", "err"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_this_process_after_what_it_started(number, tmp_path, capsys):
    launcher, statuses = Launcher(), []
    before = signal.getsignal(number)
    log = tmp_path / "log.txt"
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\n"
        "time.sleep(2 if 'SIGINT' in sys.argv else 60)"
    )
    command = [sys.executable, "-c", code, signal.Signals(number).name]
    thread = threading.Thread(target=lambda: statuses.append(launcher.run(command, log)))

    def run_and_signal():
        with launcher.listening():
            thread.start()
            while not (log.exists() and "ready" in log.read_text(encoding="utf-8")):
                assert thread.is_alive()
                time.sleep(0.05)
            os.kill(os.getpid(), number)
            thread.join()

    with pytest.raises(SystemExit) as end:
        run_and_signal()
    assert end.value.code == 128 + number
    # a terminal sends SIGINT to all processes itself
    assert statuses == [7 if number == signal.SIGTERM else 0]
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(number) is before
