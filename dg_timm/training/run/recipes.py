"""Recipes: YAML files of options, which become the defaults of a command line."""

import argparse
import difflib
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# A resumed run may differ in these; every other option decides what the weights become.
FREE_OPTIONS = frozenset(
    {"recipe", "output", "resume", "dry_run", "data_summary", "workers", "report_to", "keep", "save_every", "log_every",
     "val_batch_size", "on_bad_image", "patience", "allow_changed"}
)  # fmt: skip

_ALIASES = {  # what other trainers call it
    "learning_rate": "lr", "wd": "weight_decay", "label_smoothing": "smoothing", "optimizer": "opt",
    "scheduler": "sched", "num_epochs": "epochs", "dropout": "drop", "teacher": "distill", "amp": "mixed_precision",
    "dataset": "data", "train_img_sizes": "size_schedule",
}  # fmt: skip


def parse_with_recipe(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    recipes: Path | None = None,
    defaults_with: Mapping[str, Mapping[str, Any]] | None = None,
) -> argparse.Namespace:
    """Parse a command line. The options of its ``--recipe`` become defaults, which the command line overrides.

    ``--help`` after a ``--recipe`` shows the recipe's values.

    Args:
        parser: with a ``--recipe`` option, and no argument that is required.
        argv: words of the command line; by default those of this process.
        recipes: folder in which a recipe is looked up by name.
        defaults_with: {option: defaults of others where the command line gives it}; a recipe overrides them.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for option, defaults in (defaults_with or {}).items():
        if any(word.partition("=")[0] == option for word in argv):
            parser.set_defaults(**defaults)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    name = finder.parse_known_args(argv)[0].recipe
    recipe: dict[str, Any] = {}
    if name is not None:
        file = _find_recipe(parser, name, recipes)
        recipe = _check_recipe(parser, file, _read_recipe(parser, file))
        parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")}
    _drop_epochs(args, recipe, given)
    _require_target(parser, args, {*recipe, *given})
    return args


# Of a price on cost, which has none without a target.
_OF_TARGET = ("cost_weight", "cost_ramp", "cost_noise", "cost_quiet", "cascade", "no_cascade")


def _require_target(parser: argparse.ArgumentParser, args: argparse.Namespace, given: Collection[str]) -> None:
    idle = [f"--{name.replace('_', '-')}" for name in _OF_TARGET if name in given]
    if idle and args.target_cost is None:
        parser.error(f"{', '.join(idle)}: nothing has a price without --target-cost; give it, too")


# What a recipe counts in epochs has no meaning where the command line counts a training in updates.
_OF_EPOCHS = {"warmup_epochs": 0.0, "cooldown_epochs": 0, "decay_epochs": None, "warmup_prefix": False}


def _drop_epochs(args: argparse.Namespace, recipe: Mapping[str, Any], given: Collection[str]) -> None:
    """Leave out what the recipe says in epochs if the command line says --updates, and say so."""
    if "updates" not in given:
        return
    dropped = [name for name in _OF_EPOCHS if name in recipe and name not in given and recipe[name] != _OF_EPOCHS[name]]
    for name in dropped:
        setattr(args, name, _OF_EPOCHS[name])
    if dropped:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in dropped)
        print(
            f"{names} of recipe {args.recipe} left out: it counts epochs, and --updates counts updates", file=sys.stderr
        )


def _find_recipe(parser: argparse.ArgumentParser, name: str, recipes: Path | None) -> Path:
    file = Path(name)
    if file.is_file():
        return file
    known = sorted(path.stem for path in recipes.glob("*.yaml")) if recipes else []
    if recipes and name.removesuffix(".yaml") in known:
        return recipes / f"{name.removesuffix('.yaml')}.yaml"
    parser.error(f"--recipe {name}: no such file or recipe{_nearest(name, known)}; there are {', '.join(known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; the nearest one is {near[0]}" if near else ""


def _read_recipe(parser: argparse.ArgumentParser, file: Path) -> dict[Any, Any]:
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"recipe {file} is not valid YAML: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"recipe {file} must map options to values")
    return recipe


def _check_recipe(parser: argparse.ArgumentParser, file: Path, recipe: Mapping[Any, Any]) -> dict[str, Any]:
    """Check names and values as a command line is checked; return the values that the parser makes of them."""
    defaults = vars(parser.parse_args([]))
    defaults.pop("recipe")
    words: list[str] = []
    given: list[str] = []
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name not in defaults:
            near = _ALIASES.get(name) or difflib.get_close_matches(name, defaults, n=1, cutoff=0.0)[0]
            parser.error(f"recipe {file} has the unknown option {key!r}; the nearest one is {near!r}")
        if isinstance(defaults[name], bool) and not isinstance(value, bool | None):
            parser.error(f"recipe {file}: {key} must be true or false, got {value!r}")
        if value is not None:
            words += _as_words(name, value, defaults[name])
            given.append(name)
    checked = vars(parser.parse_args(words))
    return {name: checked[name] for name in given}


def _as_words(name: str, value: Any, default: Any) -> list[str]:
    """Write a value of a recipe as it would stand on a command line."""
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [option]
    if value is False:
        return [option.replace("--", "--no-", 1)] if default is True else []
    if isinstance(value, dict):
        return [option, *(f"{key}={one}" for key, one in value.items())]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [f"{option}={value}"]


def find_differences(
    now: Mapping[str, Any], then: Mapping[str, Any], free: Collection[str] = FREE_OPTIONS
) -> list[str]:
    """Write a line for every option in which two runs differ although it decides what the weights become.

    Args:
        now: options of the run that would go on. Those that its ``allow_changed`` names may differ.
        then: options of the run that is to be resumed.
        free: names of options that may differ.
    """
    allowed = {*free, *(name.lstrip("-").replace("-", "_") for name in now.get("allow_changed", ()))}
    keys = [key for key in dict.fromkeys([*then, *now]) if key not in allowed]
    return [
        f"--{k.replace('_', '-')}: {then.get(k)!r} then, {now.get(k)!r} now" for k in keys if then.get(k) != now.get(k)
    ]
