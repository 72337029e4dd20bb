"""Recipes: YAML files of options."""

import sys
from pathlib import Path

import pytest

import dg_timm
from dg_timm.cli import train as script
from dg_timm.training.run.recipes import FREE_OPTIONS, find_differences


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "has the unknown option 'learning_rate'; the nearest one is 'lr'"),
        ("batchsize: 1", "unknown option 'batchsize'; the nearest one is 'batch_size'"),
        ("lr: [1, 2", "is not valid YAML"),
        ("- 1", "must map options to values"),
        ("channels_last: maybe", "channels_last must be true or false, got 'maybe'"),
        ("lr: true", "argument --lr: expected one argument"),
        ("clip_mode: most", "argument --clip-mode: invalid choice: 'most'"),
        ("model_kwargs: [1]", "--model-kwargs takes key=value, got '1'"),
        ("epochs: many", "argument --epochs: 'many' is not an integer"),
    ],
)
def test_bad_recipes(tmp_path, capsys, text, message):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        script.parse(["--recipe", str(tmp_path / "recipe.yaml")])
    assert message in capsys.readouterr().err


def test_a_price_needs_a_target(tmp_path, capsys):
    for words in (["--cost-weight", "20"], [*recipe(tmp_path, "cost_noise: 0.5"), "--cost-ramp=0"]):
        with pytest.raises(SystemExit):
            script.parse(words)
        assert "nothing has a price without --target-cost; give it, too" in capsys.readouterr().err
        assert script.parse([*words, "--target-cost", "0.7"]).target_cost == [0.7]


def recipe(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return "--recipe", str(tmp_path / "recipe.yaml")


def test_a_recipe_sets_values_of_every_kind(tmp_path):
    """They get the types that the command line would give them."""
    text = """
    lr: 4e-3
    batch-size: 96
    augment: false
    channels_last: true
    streaming: false
    distill: true
    scale: [0.5, 1]
    model_kwargs: {edge_scale: false, topology: ws}
    mean: null
    label_names: größe.txt
    """
    args = script.parse([*recipe(tmp_path, text)])
    assert (args.lr, args.batch_size, args.scale) == (4e-3, 96, [0.5, 1.0])
    assert (args.augment, args.channels_last, args.streaming, args.mean) == (False, True, False, None)
    assert args.distill == "static"
    assert args.model_kwargs == {"edge_scale": False, "topology": "ws"}
    assert args.label_names == "größe.txt"
    untouched = script.parse([])
    changed = {
        "recipe",
        "lr",
        "batch_size",
        "augment",
        "channels_last",
        "distill",
        "scale",
        "model_kwargs",
        "label_names",
    }
    assert {key for key, value in vars(args).items() if value != vars(untouched)[key]} == changed | {"label_names"}


def test_the_command_line_overrides_the_recipe(tmp_path):
    text = "lr: 0.3\naugment: false\ndistill: true\nscale: [0.5, 1]"
    words = [*recipe(tmp_path, text), "--lr", "0.1", "--augment", "--distill", "none", "--scale", "0.2", "0.3"]
    args = script.parse(words)
    assert (args.lr, args.augment, args.distill, args.scale) == (0.1, True, "none", [0.2, 0.3])


def test_help_shows_the_values_of_the_recipe(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        script.parse([*recipe(tmp_path, "lr: 0.3125"), "--help"])
    assert ended.value.code == 0
    assert "(default: 0.3125)" in capsys.readouterr().out


def test_recipes_ship_with_the_package():
    assert Path(dg_timm.__file__).parent / "recipes" == script.RECIPES
    assert {"digits", "cifar10_finetune", "imagenet_resnet"} <= {path.stem for path in script.RECIPES.glob("*.yaml")}


def test_only_options_that_decide_what_the_weights_become_are_compared():
    then = {"lr": 0.1, "workers": 2, "data": "a", "pictures": 4}
    now = {"lr": 0.2, "workers": 0, "data": "b", "pictures": 0, "allow_changed": ["--data"]}
    assert find_differences(now, then) == ["--lr: 0.1 then, 0.2 now", "--pictures: 4 then, 0 now"]
    assert find_differences(now, then, FREE_OPTIONS | {"pictures"}) == ["--lr: 0.1 then, 0.2 now"]
    assert not find_differences(now | {"allow_changed": ["data", "lr", "pictures"]}, then)


RECIPES = sorted(script.RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_runs_dry(recipe, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = script.parse(["--recipe", str(recipe)])
    extra = ["--micro-batch", "2", "--image-size", "32", "--model", "dg_test_resnet", "--no-pretrained"]
    extra += ["--distill", "none"]
    extra += [] if args.data == "digits" else ["--epoch-size", "50000", "--num-classes", "10"]
    extra += [] if args.data else ["--data", "digits"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", str(recipe), "--dry-run", *extra])
    assert script.main() == 0
    out = capsys.readouterr().out
    assert "parameter groups" in out
    assert "images an update" in out
    assert "hours in all" in out
    assert not list(tmp_path.iterdir())


PAPER = {  # appendix 6.1: epochs, learning rate, warm-up, weight decay, smoothing, dropout
    "imagenet_mobilenetv2": (200, 0.4, 5, 4e-5, 0.1, 0.2),
    "imagenet_resnet": (100, 0.4, 5, 1e-4, 0.1, None),
    "imagenet_regnet": (100, 0.8, 5, 5e-5, 0.1, None),
    "imagenet_regnet_250": (250, 0.8, 5, 5e-5, 0.1, None),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper(name):
    args = script.parse(["--recipe", name])
    found = (args.epochs, args.lr, args.warmup_epochs, args.weight_decay, args.smoothing, args.drop)
    assert found == PAPER[name]
    assert (args.batch_size, args.momentum, args.sched) == (1024, 0.9, "cosine")
    assert args.opt in ("sgd", "momentum")  # timm's sgd is Nesterov's, as in Goyal et al. and in RegNet's code
