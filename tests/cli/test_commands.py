"""``dg-timm``: the table of commands, and how a command ends."""

import importlib
import sys

import pytest

from dg_timm._errors import BadValue, CommandStopped
from dg_timm.cli.errors import cli_errors
from dg_timm_cli import COMMANDS, main
from tests.helpers.scripts import python


def test_help_does_not_wait_for_torch():
    program = "import sys; from dg_timm_cli import main; main(['--help']); assert 'torch' not in sys.modules"
    process = python("-c", program)
    assert process.returncode == 0, process.stderr
    assert all(f"  {name} " in process.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert printed.startswith(f"usage: dg-timm {name} ")
    assert f"    dg-timm {name}" in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_guards_its_end(name):
    assert importlib.import_module(COMMANDS[name].module).main.__wrapped__


def test_python_m_is_the_same_command():
    process = python("-m", "dg_timm", "--version")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("dg-timm 0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no command 'trian'; the nearest one is 'train'"),
        (["train", "--recipe", "digits", "--epoch", "3"], "the nearest option is --epochs"),
        (["train", "--recipe", "digit"], "no such file or recipe; the nearest one is digits"),
        (["train"], "--data is missing"),
        (["validate", "dg_resnet18"], "--data is missing"),
        (["predict", "dg_resnet81", "x.png"], "there is no file or folder x.png"),
        (["show", "dg_resnet81", "README.md"], "do you mean dg_resnet18"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_names_the_nearest(words, message, capsys):
    try:
        status = main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "dg_timm.cli.train", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["train", "--help"]) == 2
    assert "pip install 'dg-timm[train]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (BadValue("x is wrong"), 2, "error: x is wrong\n"),
        (OSError(28, "No space left on device", "file"), 2, "error: [Errno 28] No space left on device: 'file'\n"),
        (PermissionError(13, "Permission denied", "file"), 2, "error: [Errno 13] Permission denied: 'file'\n"),
        (CommandStopped(143, ""), 143, ""),
        (CommandStopped(1, "error: nan"), 1, "error: nan\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
    ids=repr,
)
def test_how_a_command_ends(error, status, line, capsys, monkeypatch):
    @cli_errors
    def command() -> int:
        raise error

    monkeypatch.delenv("DG_TIMM_DEBUG", raising=False)
    assert command() == status
    assert capsys.readouterr().err == line
    monkeypatch.setenv("DG_TIMM_DEBUG", "1")
    with pytest.raises(type(error)):
        command()


@pytest.mark.parametrize("error", [ValueError("x"), OSError(5, "Input/output error"), FileNotFoundError(2, "x")])
def test_a_defect_keeps_its_traceback(error):
    @cli_errors
    def command() -> int:
        raise error

    with pytest.raises(type(error)):
        command()


def test_debug_shows_the_traceback_of_a_mistake():
    process = python("-m", "dg_timm", "card", "resnet81", "--debug")
    assert process.returncode == 1
    assert "Traceback" in process.stderr
