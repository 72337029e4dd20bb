"""The trials of each experiment, and the results of this repository, which belong to them."""

import shutil
from pathlib import Path

import pytest

from dg_timm.experiments import ablation, budgets, finetuning, randwire_cost
from dg_timm.experiments.curves import DEEPEST, DYNAMIC, NAMES
from dg_timm.experiments.options import make_parser, parse
from dg_timm.experiments.runner import run_trials
from dg_timm.experiments.skipping import Plan
from dg_timm.experiments.trial import Trial, option_text, option_words
from tests.helpers.scripts import ROOT, rows

RESULTS = ROOT / "results" / "experiments"


def test_a_random_topology_is_drawn_with_the_seed_of_the_trial():
    names = list(ablation.VARIANTS)
    found = ablation.trials([0, 1, 2], names, "cifar10_scratch")
    assert len({trial.folder for trial in found}) == 3 * len(names)
    drawn = [trial for trial in found if "topology" in trial.options.get("model-kwargs", {})]
    assert len(drawn) == 3 * 6
    assert all(trial.options["model-kwargs"]["topology_seed"] == trial.seed for trial in drawn)


def test_networks_are_trained_at_16_pixels_and_then_at_32():
    chained = budgets.trials(NAMES, 0, [0.5, 0.4], False)
    assert len({trial.folder for trial in chained}) == len(chained) == 11
    for place, trial in enumerate(chained):
        assert all(other in chained[:place] for other in trial.depends_on.values())
    by_name = {trial.name: trial for trial in chained}
    assert by_name["skip"].depends_on["initial-checkpoint"].name == f"{DEEPEST}-16px"
    learned = by_name[f"{DYNAMIC}-0.4"]
    assert learned.options["cost-ramp"] == 0
    assert "cost-ramp" not in learned.depends_on["initial-checkpoint"].options


def test_in_full_every_network_is_trained_at_32_pixels_alone():
    full = budgets.trials(NAMES, 0, [0.5, 0.4], True)
    assert not any(trial.depends_on for trial in full)
    assert [trial.options.get("target-cost") for trial in full][:3] == [0.5, 0.4, None]
    assert {trial.options["recipe"] for trial in full} == {"cifar10_full"}


def test_distillation_goes_on_from_both_networks():
    distilled = budgets.trials(NAMES, 0, [0.5], True, distill=True)[-2:]
    assert [set(trial.depends_on) for trial in distilled] == [{"initial-checkpoint"}, {"initial-checkpoint", "distill"}]
    assert {trial.depends_on["distill"].name for trial in distilled[1:]} == {DEEPEST}
    assert [trial.name for trial in distilled] == [f"{DEEPEST}-longer", f"{DYNAMIC}-0.5-distilled"]


def test_fine_tuning_takes_a_file_or_the_published_weights():
    weights = Path("some/weights.safetensors")
    found = finetuning.trials([0, 1], weights, False)
    assert {trial.options["initial-checkpoint"] for trial in found} == {weights}
    assert len(found) == 4
    full = finetuning.trials([0], None, True)
    assert all(trial.options["pretrained"] is True and trial.options["image-size"] == 96 for trial in full)


@pytest.mark.parametrize(
    ("value", "text", "words"),
    [
        (True, "True", ["--key"]),
        ("True", "True", ["--key"]),
        (0.5, "0.5", ["--key", "0.5"]),
        ([1, 2], "1 2", ["--key", "1", "2"]),
        ({"a": 1, "b": "x"}, "a=1 b=x", ["--key", "a=1", "b=x"]),
        ("1 2", "1 2", ["--key", "1", "2"]),
        (Path("a folder/file"), "file", ["--key", "a folder/file"]),
    ],
)
def test_an_option_as_text_and_as_words(value, text, words):
    assert option_text(value) == text
    assert option_words("key", value) == words


def collect(trials: list[Trial], folder: Path, *more: str) -> int:
    """How many of the trials have a result in a folder; one of other options is an error."""
    words = ["--data", "cifar10", "--collect", "--output", "no/such/folder", "--results", str(folder), *more]
    return len(run_trials(trials, parse(make_parser(None), "x", "more", words)))


@pytest.mark.parametrize(
    ("trials", "folder", "count"),
    [
        (ablation.trials([0, 1, 2], list(ablation.VARIANTS), "cifar10_scratch"), "ablation", 42),
        (budgets.trials(NAMES, 0, [0.6, 0.5], True, distill=True), "budgets_full", 9),
    ],
)
def test_the_results_of_this_repository_are_those_of_today_s_options_and_recipes(trials, folder, count):
    assert collect(trials, RESULTS / folder) == count == len(trials)


def test_the_results_of_skipping_are_those_of_today_s_options_and_recipes():
    plan = Plan("tf_efficientnet_lite0", Path("model.safetensors"), {})
    start = plan.start(0)
    trials = [start, plan.longer(start), plan.range(start)]
    assert collect(trials, RESULTS / "skipping", "--data", "imagenette") == len(trials)


def test_the_tables_of_this_repository_are_made_of_its_results(tmp_path):
    kept = tmp_path / "ablation"
    shutil.copytree(RESULTS / "ablation", kept)
    for table in ("ablation.csv", "ablation.md", "ablation.png"):
        (kept / table).unlink()
    words = ["--data", "cifar10", "--collect", "--output", str(tmp_path / "none"), "--results", str(kept)]
    assert ablation.main(words) == 0
    for table in ("ablation.csv", "ablation.md"):
        assert (kept / table).read_bytes() == (RESULTS / "ablation" / table).read_bytes()
    assert (kept / "ablation.png").stat().st_size > 1000


def test_the_counts_of_this_repository_are_those_of_today_s_networks(tmp_path, capsys):
    assert randwire_cost.main(["--seeds", "1", "--results", str(tmp_path)]) == 0
    kept = {(row["topology"], row["seed"]): row for row in rows(RESULTS / "randwire" / "randwire.csv")}
    counted = rows(tmp_path / "randwire.csv")
    assert [row["topology"] for row in counted] == list(randwire_cost.PAPER)
    assert all(row == kept[row["topology"], "0"] for row in counted)
    assert "| DG-Net | 611 | 602.4 | 6.22 |" in capsys.readouterr().out
