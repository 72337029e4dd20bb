"""Trials: each is trained once, in order, and what fails is named."""

import contextlib
import json

import pytest

from dg_timm._errors import BadState, BadValue
from dg_timm.experiments.runner import run_trials
from dg_timm.experiments.store import TrialStore
from dg_timm.experiments.trial import Trial
from tests.helpers.experiments import FakeLauncher, experiment_options, keep_result

FIRST = Trial("first", {"model": "x"})
SECOND = Trial("second", {"model": "x"}, 0, {"initial-checkpoint": FIRST})


def finish(args, trial):
    """Let the training of a trial have come to its end."""
    store = TrialStore(args)
    store.network(trial).mkdir(parents=True, exist_ok=True)
    (store.folder(trial) / "finished.json").write_text(json.dumps(store.options(trial)), encoding="utf-8")


def test_finished_trials_are_read_and_never_trained_again(tmp_path):
    args, launcher = experiment_options(tmp_path), FakeLauncher()
    done = [Trial("a", {"model": "x"}, seed) for seed in (0, 1)]
    for trial in done:
        keep_result(args, trial)
    assert [result.figures["eval_top1"] for result in run_trials(done, args, launcher=launcher)] == [50.0, 51.0]
    args.collect = True
    assert len(run_trials([*done, Trial("b")], args, launcher=launcher)) == 2  # what is not finished is left out
    assert launcher.commands == []


def test_a_training_is_started_with_the_options_and_its_result_is_kept(tmp_path):
    args = experiment_options(tmp_path, "--set", "epochs=1", "opt-kwargs=a=1 b=2")
    launcher, weights = FakeLauncher(71.5), tmp_path / "my weights.safetensors"
    trial = Trial("a", {"model-kwargs": {"topology": "ws", "edge_scale": False}, "pretrained": True, "epochs": 9,
                        "initial-checkpoint": weights}, seed=3)  # fmt: skip
    (result,) = run_trials([trial], args, launcher=launcher)
    assert launcher.commands[0][1:] == [
        "-m", "dg_timm.cli.train", "--data", "digits", "--output", f"{tmp_path}/out/a-3/run", "--resume", "auto",
        "--model-kwargs", "topology=ws", "edge_scale=False", "--pretrained", "--epochs", "1",
        "--initial-checkpoint", str(weights), "--opt-kwargs", "a=1", "b=2", "--seed", "3",
    ]  # fmt: skip
    assert result.figures == {"epoch": 2, "eval_top1": 71.5}  # without times and what is empty
    assert result.seconds == 3.0
    kept = json.loads((args.results / "a-3.json").read_text(encoding="utf-8"))
    assert kept["options"]["initial-checkpoint"] == weights.name
    assert kept["options"]["epochs"] == "1"
    again = FakeLauncher()
    assert run_trials([trial], args, launcher=again) == [result]
    assert again.commands == []


def test_results_of_other_options_are_refused(tmp_path):
    args, trial = experiment_options(tmp_path), Trial("a", {"model": "x"})
    keep_result(args, trial, model="y")
    with pytest.raises(BadValue, match=r"of other options \(model: y there, x now\); give another --results"):
        run_trials([trial], args, launcher=FakeLauncher())
    keep_result(args, trial)
    args.data = "uoft-cs/cifar10"
    with pytest.raises(BadValue, match="data: digits there, uoft-cs/cifar10 now"):
        run_trials([trial], args, launcher=FakeLauncher())


def test_a_recipe_that_was_changed_is_another_option(tmp_path):
    args, trial = experiment_options(tmp_path), Trial("a", {"recipe": "digits"})
    recipe = TrialStore(args).options(trial)["of_recipe"]
    assert recipe["model"].startswith("dg_")
    keep_result(args, trial, of_recipe={**recipe, "epochs": 999})
    with pytest.raises(BadValue, match=r"of other options \(of_recipe: .*999"):
        run_trials([trial], args, launcher=FakeLauncher())


@pytest.mark.parametrize("content", ["{}", "not JSON", "[]", '{"options": 1}'])
def test_a_file_that_is_not_a_result_is_refused(tmp_path, content):
    args = experiment_options(tmp_path)
    args.results.mkdir()
    (args.results / "a-0.json").write_text(content, encoding="utf-8")
    with pytest.raises(BadValue, match=r"a-0\.json is not a result of a trial .*; move it away"):
        run_trials([Trial("a")], args, launcher=FakeLauncher())


def test_two_trials_of_one_name_are_refused(tmp_path):
    with pytest.raises(BadValue, match="two trials have one name"):
        run_trials([Trial("b"), Trial("b")], experiment_options(tmp_path), launcher=FakeLauncher())


def test_a_trial_starts_from_the_network_of_another(tmp_path):
    args, launcher = experiment_options(tmp_path), FakeLauncher()
    run_trials([FIRST, SECOND], args, launcher=launcher)
    assert launcher.started == ["first-0", "second-0"]
    words = launcher.commands[1]
    assert words[words.index("--initial-checkpoint") + 1] == f"{tmp_path}/out/first-0/run/checkpoints/last"
    kept = json.loads((args.results / "second-0.json").read_text(encoding="utf-8"))
    assert kept["options"]["initial-checkpoint"] == "first-0"


def test_a_finished_trial_is_trained_again_only_if_its_network_is_needed_and_gone(tmp_path):
    args = experiment_options(tmp_path)
    keep_result(args, FIRST)

    def started(**options):
        args_now = experiment_options(tmp_path)
        launcher = FakeLauncher(status=lambda folder: 1)  # nothing is finished by these
        with contextlib.suppress(BadState):
            run_trials([FIRST, SECOND], args_now, launcher=launcher, **options)
        return launcher.started

    assert started() == ["first-0"]  # and the other, which needs it, can't be
    TrialStore(args).network(FIRST).mkdir(parents=True)
    assert started() == ["first-0"]  # the run was not finished
    finish(args, FIRST)
    assert started() == ["second-0"]
    keep_result(args, SECOND)
    assert started() == []
    assert started(networks=True) == ["second-0"]


def test_a_trial_that_is_trained_again_says_whether_it_gave_the_same(tmp_path, capsys):
    args = experiment_options(tmp_path)
    run_trials([FIRST], args, launcher=FakeLauncher(60.0))
    before = (args.results / "first-0.json").read_bytes()
    for top1, said in ((60.0, "first-0: as before"), (61.0, "first-0: NOT as before: other figures")):
        (args.output / "first-0" / "finished.json").unlink()
        run_trials([FIRST], args, launcher=FakeLauncher(top1), networks=True)
        assert said in capsys.readouterr().out
    assert (args.results / "first-0.json").read_bytes() == before


def test_what_needs_a_training_that_failed_is_not_trained(tmp_path):
    args = experiment_options(tmp_path, "--jobs", "1")
    third, other = Trial("third", {}, 0, {"distill": SECOND}), Trial("other")
    launcher = FakeLauncher(status=lambda folder: int(folder == "first-0"))
    (tmp_path / "out" / "first-0" / "run").mkdir(parents=True)
    (tmp_path / "out" / "first-0" / "run" / "summary.csv").touch()
    with pytest.raises(BadState) as failure:
        run_trials([FIRST, SECOND, third, other], args, launcher=launcher)
    first, second, last = str(failure.value).split("; ")
    assert first.startswith("first-0 failed (1): the end of first-0 (all of it: ")
    assert (second, last) == ("second-0 needs first-0", "third-0 needs second-0")
    assert launcher.started == ["first-0", "other-0"]
    assert (args.results / "other-0.json").exists()


def test_what_the_training_refuses_at_once_ends_the_experiment(tmp_path):
    args = experiment_options(tmp_path, "--jobs", "1")
    launcher = FakeLauncher(status=lambda folder: 2)
    with pytest.raises(BadState, match=r"a-0 failed \(2\).*; b-0 was not started"):
        run_trials([Trial("a"), Trial("b")], args, launcher=launcher)
    assert launcher.started == ["a-0"]


def test_what_a_run_refuses_after_its_first_epoch_ends_that_run_alone(tmp_path):
    args = experiment_options(tmp_path, "--jobs", "1")
    launcher = FakeLauncher(status=lambda folder: 2 if folder == "a-0" else 0)
    (tmp_path / "out" / "a-0" / "run").mkdir(parents=True)
    (tmp_path / "out" / "a-0" / "run" / "summary.csv").touch()
    with pytest.raises(BadState, match="a-0 failed"):
        run_trials([Trial("a"), Trial("b")], args, launcher=launcher)
    assert launcher.started == ["a-0", "b-0"]


def test_nothing_is_started_after_a_signal(tmp_path):
    args, launcher = experiment_options(tmp_path, "--jobs", "1"), FakeLauncher()
    launcher.stopped_by = 15
    with pytest.raises(BadState, match="a-0 was not started"):
        run_trials([Trial("a")], args, launcher=launcher)
    assert launcher.commands == []


def test_trainings_that_fail_are_named_with_what_they_said(tmp_path):
    args = experiment_options(tmp_path, "--jobs", "2")
    trials = [Trial("wrong", {"model": "no_such_model"}), Trial("no_data", {"data": "/no/such/folder"})]
    with pytest.raises(BadState, match=r"wrong-0 failed \(2\): error: no_such_model is not .*no_data-0 (failed|was)"):
        run_trials(trials, args)
    log = args.output / "wrong-0" / "log.txt"
    assert "no_such_model" in log.read_text(encoding="utf-8")
