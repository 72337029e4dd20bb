"""The thin files of train_scripts: each has a help, and what it runs is importable from the package."""

import ast
import importlib
import runpy
import sys

import pytest

from dg_timm.cli.errors import cli_errors
from tests.helpers.scripts import ROOT, SCRIPTS

FILES = sorted(str(path.relative_to(SCRIPTS)) for path in SCRIPTS.rglob("*.py"))


def imported(file: str) -> str:
    """The module from which an entry file takes its ``main``."""
    (found,) = [node for node in ast.parse((SCRIPTS / file).read_text(encoding="utf-8")).body
                if isinstance(node, ast.ImportFrom)]  # fmt: skip
    assert [name.name for name in found.names] == ["main"]
    return str(found.module)


def test_there_are_entry_files():
    assert len(FILES) >= 16
    assert "train.py" in FILES
    assert "experiments/ablation.py" in FILES


@pytest.mark.parametrize("file", FILES)
def test_an_entry_file_only_imports_a_main_of_the_package(file):
    module = imported(file)
    assert module.startswith("dg_timm.")
    assert callable(importlib.import_module(module).main)
    assert len((SCRIPTS / file).read_text(encoding="utf-8").splitlines()) < 15


@pytest.mark.parametrize("file", FILES)
def test_an_entry_file_names_the_module_that_it_runs(file):
    assert f":mod:`{imported(file)}`" in (SCRIPTS / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES)
def test_the_help_of_an_entry_file(file, tmp_path, monkeypatch, capsys):
    """In this process: torch takes seconds to import, and every test of a script starts a real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / file), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / file), run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {file.rpartition('/')[2]} ")


def test_scripts_of_other_kinds_name_entry_files_that_exist():
    for script in ("measure_performance.sh", "slurm_train.sbatch"):
        words = (SCRIPTS / script).read_text(encoding="utf-8").split()
        named = {word.strip("\"'") for word in words if "train_scripts/" in word and ".py" in word}
        assert named
        assert all((ROOT / name).is_file() for name in named), named


def test_a_main_keeps_its_name_and_its_arguments():
    @cli_errors
    def main(status: int) -> int:
        """Say so."""
        return status

    assert (main.__name__, main.__doc__, main(3), main(status=4)) == ("main", "Say so.", 3, 4)
