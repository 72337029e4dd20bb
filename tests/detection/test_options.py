"""Options of detect.py: what is refused, and what a resumed run may change."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import timm

from dg_timm.cli import detect as cli
from dg_timm.detection.config import SHOWN_OPTIONS
from dg_timm.training.run.recipes import FREE_OPTIONS, find_differences
from tests.helpers.detection import TINY, write_coco
from tests.training.kill_and_resume import DETECT


@pytest.mark.parametrize(
    ("options", "error"),
    [(("--data", "nowhere/at/all"), "nowhere/at/all"),
     (("--model", "vit_tiny_patch16_224"), "needs 4, 8, 16, 32"),
     (("--model", "dg_resnet81"), "do you mean"),
     (("--batch-size", 400), "--batch-size 400 is more than the 16 images"),
     (("--batch-size", 8, "--micro-batch", 3), "--micro-batch 3 does not divide"),
     (("--val-split", "spring"), "--val-split spring: digits has no such split"),
     (("--layer-decay", 0.7), "--layer-decay is for classifiers"),
     (("--warmup-updates", 3), "belong to --updates"),
     (("--updates", 30, "--warmup-epochs", 1), "--warmup-epochs: counted in epochs"),
     (("--initial-checkpoint", "missing.safetensors"), "missing.safetensors"),
     (("--detector", "fcos"), "fcos needs 64, 96, 128"),
     (("--evaluate", "missing"), "missing has no config.json")],
)  # fmt: skip
def test_bad_options_are_refused_before_anything_is_written(options, error, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["detect.py", *map(str, TINY), *map(str, options), "--output", str(tmp_path / "run")]
    )
    assert cli.main() == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_have_to_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["detect.py", "--model", "dg_test_resnet", "--output", str(tmp_path / "run")])
    assert cli.main() == 2
    assert "--data is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_split_of_crowds_has_nothing_to_find(tmp_path, capsys, monkeypatch):
    folder = Path(write_coco(tmp_path / "data"))
    whole = json.loads((folder / "instances_val.json").read_text(encoding="utf-8"))
    whole["annotations"] = [one for one in whole["annotations"] if one["iscrowd"]]
    (folder / "instances_val.json").write_text(json.dumps(whole), encoding="utf-8")
    options = ["--data", str(folder), "--batch-size", "1", "--output", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["detect.py", *options])
    assert cli.main() == 2
    assert re.search("instances_val.json .*has no box to find", capsys.readouterr().err)


def test_what_is_not_installed_is_named_at_the_start(monkeypatch, capsys, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pycocotools" else found(name))
    monkeypatch.setattr("sys.argv", ["detect.py", *map(str, TINY), "--output", str(tmp_path / "run")])
    assert cli.main() == 2
    assert "pycocotools is not installed: pip install 'dg-timm[detect]'" in capsys.readouterr().err


def test_what_is_only_shown_may_change_in_a_resumed_run():
    then, now = cli.parse(["--pictures", "4"]), cli.parse(["--pictures", "0", "--picture-score", "0.1"])
    free = FREE_OPTIONS | SHOWN_OPTIONS
    assert find_differences(vars(now), vars(then), free) == []
    assert find_differences(vars(cli.parse(["--crop", "0.1"])), vars(then), free) == ["--crop: 0.0 then, 0.1 now"]


def test_a_resumed_run_may_change_what_is_shown_and_nothing_of_another_is_replaced(monkeypatch):
    """detect.py tells the loop which options and files are its own."""
    handed = {}
    monkeypatch.setattr(cli, "run_training", lambda *args, **options: handed.update(options))
    monkeypatch.setattr("sys.argv", ["detect.py", "--data", "digits", "--pictures", "0"])
    assert cli.main() == 0
    assert handed["free_options"] >= {"pictures", "picture_score", "evaluate", "execution", "resume", "output"}
    assert set(handed["files"]) >= {"args.yaml", "checkpoints", "predictions.json", "detections.png"}


def test_every_option_says_what_it_is_and_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    options = text[text.index("options: -h") :]
    assert len(re.findall(r"--[a-z]", options)) > 80
    for name, value in vars(cli.parse([])).items():
        option = f"--{name.replace('_', '-')}"
        found = re.search(rf"{option}(, --no-| \[?[A-Z{{]| print)", options)
        assert found, option
        if value not in (None, [], {}, False, "output/detect"):
            assert f"(default: {value})" in options, option
        elif value is None:
            assert "by default" in options[found.start() : found.start() + 350], option


@pytest.mark.parametrize("option", [("--detector", "yolo"), ("--anchor-size", "6"), ("--freeze-levels", "5"),
                                    ("--hflip", "2"), ("--recipe", "nothing")])  # fmt: skip
def test_options_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        cli.parse(list(option))
    assert option[1] in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "dg_timm/recipes/detection").glob("*.yaml")))
def test_recipes_are_valid(recipe):
    args = cli.parse(["--recipe", recipe.stem])
    assert args.recipe == recipe.stem
    assert timm.is_model(args.model)


def test_the_short_options_of_the_kill_test_are_valid():
    assert cli.parse(shlex.split(DETECT)).photometric == 0.5
