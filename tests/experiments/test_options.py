"""The command lines of the experiments, and where their results go."""

import re

import pytest

from dg_timm._errors import BadValue
from dg_timm.cli.errors import cli_errors
from dg_timm.experiments import ablation, budgets, finetuning, paths, ship
from dg_timm.experiments.options import make_parser, parse, results_folder
from tests.helpers.scripts import ROOT


def test_the_full_size_has_folders_of_its_own():
    small, full = (parse(make_parser(None), "x", "more", ["--data", "d", *more]) for more in ([], ["--full"]))
    assert (small.results.name, full.results.name) == ("x", "x_full")
    assert (small.output.name, full.output.name) == ("x", "x_full")


def test_results_of_a_checkout_are_kept_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert results_folder() == ROOT / "results" / "experiments"


def test_results_of_an_installed_package_are_kept_in_the_repository_around_the_current_folder(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "dg_timm"
    inside = tmp_path / "project" / "src"
    inside.mkdir(parents=True)
    (tmp_path / "project" / ".git").mkdir()
    monkeypatch.chdir(inside)
    assert results_folder(package) == tmp_path / "project" / "results" / "experiments"
    (tmp_path / "project" / ".git").rmdir()
    assert results_folder(package) == inside / "results" / "experiments"


@pytest.mark.parametrize(
    ("main", "given", "said"),
    [
        (ablation.main, ["--set", "epochs"], "--set epochs: give OPTION=VALUE"),
        (ablation.main, ["--seeds", "0", "0"], "--seeds 0 0: a seed is given twice"),
        (ablation.main, ["--seeds", "-1"], "-1 is less than 0"),
        (ablation.main, ["--output", "FILE"], "is not a folder"),
        (ablation.main, ["--collect"], "no trial is finished in .*; run without --collect"),
        (finetuning.main, ["--weights", "none.safetensors"], "--weights none.safetensors: there is no such file"),
        (finetuning.main, ["--collect"], "no trial is finished in .*; run without --collect"),
        (budgets.main, ["--rounds", "1"], "--rounds must be at least 2"),
        (budgets.main, ["--distill", "--only", "skip"], "--distill needs dg_cifar_resnet26 and cifar_resnet26"),
        (budgets.main, ["--target-cost", "2"], "2 is not between 0 and 1"),
        (budgets.main, ["--collect"], "networks are not in .*: any; run without --collect"),
        (ship.main, [], "dg_cifar_resnet26-0.6 is not in .*; train it with budgets.py"),
        (paths.main, ["--static", "nowhere"], "nowhere has no network; train it: budgets.py"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(main, given, said, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = ["--data", "digits", "--results", str(tmp_path / "r")]
    words += [str(tmp_path / "file") if word == "FILE" else word for word in given]
    if main is not paths.main and "--output" not in given:
        words += ["--output", str(tmp_path / "o")]
    try:
        status = main(words)
    except SystemExit as end:  # of argparse
        status = end.code
    assert status == 2
    assert re.search(said, capsys.readouterr().err)
    assert not list((tmp_path / "r").glob("*"))


def test_an_error_that_a_user_can_mend_is_a_line_and_a_defect_a_traceback(capsys):
    @cli_errors
    def main(error):
        raise error

    assert main(BadValue("give another")) == 2
    assert capsys.readouterr().err == "error: give another\n"
    for error in (ValueError("x"), RuntimeError("x"), OSError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            main(error)


def test_a_table_is_not_overwritten_by_one_with_fewer_networks(tmp_path):
    file = tmp_path / "budgets.csv"
    budgets.check_rows_kept(file, set())
    file.write_text("network,point\na,learned\na,0.1\nb,\n", encoding="utf-8")
    budgets.check_rows_kept(file, {"a", "b", "c"})
    with pytest.raises(BadValue, match=r"budgets\.csv holds b, which these options leave out"):
        budgets.check_rows_kept(file, {"a"})
