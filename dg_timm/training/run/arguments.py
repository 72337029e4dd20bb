"""Options of the training scripts: command line, recipes (YAML), and which of them a resumed run must share."""

import argparse
import contextlib
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from dg_timm.training.loop.optimization import SCHEDULES

# A resumed run may differ in these; every other option decides what the weights become.
RUN_OPTIONS = frozenset(
    {"recipe", "output", "resume", "dry_run", "workers", "report_to", "keep", "save_every", "log_every",
     "val_batch_size", "on_bad_image", "patience", "allow_changed", "pictures", "picture_score", "evaluate",
     "execution"}
)  # fmt: skip


_ALIASES = {  # what other trainers call it
    "learning_rate": "lr", "wd": "weight_decay", "label_smoothing": "smoothing", "optimizer": "opt",
    "scheduler": "sched", "num_epochs": "epochs", "dropout": "drop", "teacher": "distill", "amp": "mixed_precision",
    "dataset": "data",
}  # fmt: skip


def parse(
    parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None, recipes: Optional[Path] = None
) -> argparse.Namespace:
    """Parse the command line; the options of ``--recipe`` come first, so that the command line overrides them.

    Args:
        parser: with a ``--recipe`` option.
        recipes: folder in which a recipe is looked up by name.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    name = finder.parse_known_args(argv)[0].recipe
    prefix = [] if name is None else _recipe_tokens(parser, _find_recipe(parser, name, recipes))
    return parser.parse_args(prefix + argv)


def _find_recipe(parser: argparse.ArgumentParser, name: str, recipes: Optional[Path]) -> Path:
    file = Path(name)
    if file.is_file():
        return file
    known = sorted(path.stem for path in recipes.glob("*.yaml")) if recipes else []
    if recipes and name.removesuffix(".yaml") in known:
        return recipes / f"{name.removesuffix('.yaml')}.yaml"
    parser.error(f"--recipe {name}: no such file or recipe; there are {', '.join(known)}")


def _recipe_tokens(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """A recipe as command-line tokens, so that its values are checked as those of the command line are."""
    try:
        recipe = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        parser.error(f"recipe {file} is not valid YAML: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"recipe {file} must map options to values")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "recipe")}
    tokens: list[str] = []
    for key, value in recipe.items():
        dest = str(key).replace("-", "_")
        if dest not in actions:
            near = _ALIASES.get(dest) or difflib.get_close_matches(dest, actions, n=1, cutoff=0.0)[0]
            parser.error(f"recipe {file} has the unknown option {key!r}; the nearest one is {near!r}")
        option = next(o for o in actions[dest].option_strings if o.startswith("--"))
        if value is None:
            continue
        if isinstance(value, bool) and actions[dest].nargs == "?":
            tokens += [option] if value else []
        elif isinstance(actions[dest], (argparse.BooleanOptionalAction, argparse._StoreTrueAction)):
            if not isinstance(value, bool):
                parser.error(f"recipe {file}: {key} must be true or false, got {value!r}")
            if value:
                tokens.append(option)
            elif isinstance(actions[dest], argparse.BooleanOptionalAction):
                tokens.append(option.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            tokens += [option, *(f"{k}={v}" for k, v in value.items())]
        elif isinstance(value, list):
            tokens += [option, *map(str, value)]
        else:
            tokens.append(f"{option}={value}")
    return tokens


def differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """A line for every option that decides what the weights become and differs between two runs.

    Those named by ``--allow-changed`` (data that was moved, say) may differ.
    """
    allowed = RUN_OPTIONS | {name.lstrip("-").replace("-", "_") for name in now.get("allow_changed", ())}
    keys = [key for key in dict.fromkeys([*then, *now]) if key not in allowed]
    return [
        f"--{k.replace('_', '-')}: {then.get(k)!r} then, {now.get(k)!r} now" for k in keys if then.get(k) != now.get(k)
    ]


class KeyValues(argparse.Action):
    """``--model-kwargs a=1 b=x`` -> {"a": 1, "b": "x"}; values are YAML scalars."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        pairs = {}
        for text in values:
            key, equals, value = text.partition("=")
            if not equals or not key:
                parser.error(f"{option} takes key=value, got {text!r}")
            try:
                pairs[key] = _scalar(value)
            except yaml.YAMLError:
                parser.error(f"{option}: {text!r} has no valid value")
        setattr(namespace, self.dest, pairs)


def _scalar(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)  # YAML 1.1 reads 1e-8 as text
    return yaml.safe_load(text)


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _at_least(int(text), 1)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _at_least(int(text), 0)


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def amount(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = amount(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not above 0")
    return value


def _at_least(value: int, least: int) -> int:
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value


Group = Union[argparse.ArgumentParser, argparse._ArgumentGroup]


def flag(group: Group, name: str, default: bool, help: str) -> None:
    """Add ``--name`` and ``--no-name``."""
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Where images come from."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="digits", help="digits; a folder of images, Parquet, webdataset shards, or "
                      "saved by save_to_disk; a .parquet or .tar file; or a data set on the Hub")  # fmt: skip
    data.add_argument("--val-data", help="another one to evaluate on; by default a split of --data")
    data.add_argument("--train-split", help="by default train")
    data.add_argument("--val-split", help="by default validation, else test, else a fifth of every class is set aside")
    data.add_argument("--image-key", help="column of the images")
    data.add_argument("--label-key", help="column of the labels")
    data.add_argument("--label-names", help="text file with a name a line, where the data set does not tell")
    data.add_argument("--num-classes", type=positive, help="by default as many as the data set has")
    flag(data, "--streaming", False, "read rows as they are needed; the data set may be larger than the disk")
    data.add_argument(
        "--shuffle-buffer", type=positive, default=2048, help="undecoded rows of a stream that are shuffled together"
    )
    data.add_argument(
        "--epoch-size", type=positive, help="rows of an epoch of a stream that does not tell (for the schedule)"
    )
    add_reading_options(data)


def add_reading_options(data: Group) -> None:
    """How much of the data is read, by whom, and what becomes of what can't be."""
    data.add_argument("--train-limit", type=positive, help="train on a fixed random choice of so many images")
    data.add_argument("--val-limit", type=positive, help="evaluate on a fixed random choice of so many images")
    data.add_argument(
        "--on-bad-image",
        choices=("error", "skip"),
        default="error",
        help="an unreadable image ends the run, or is left out and reported",
    )
    data.add_argument(
        "--workers", type=natural, default=2, help="processes that decode, on each training process; 0 decodes in it"
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Preprocessing."""
    images = parser.add_argument_group("preprocessing (by default the model's own)")
    images.add_argument("--image-size", type=positive, help="pixels")
    images.add_argument("--in-chans", type=int, choices=(1, 3, 4), help="channels")
    images.add_argument("--mean", type=float, nargs="+")
    images.add_argument("--std", type=float, nargs="+")
    images.add_argument("--interpolation", choices=("nearest", "bilinear", "bicubic"))
    images.add_argument("--crop-pct", type=share, help="part of the resized image that evaluation sees")


def add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    """timm's augmentation."""
    aug = parser.add_argument_group("augmentation")
    flag(aug, "--augment", True, "random crops and all of the following")
    aug.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of random crops")
    aug.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect ratio of random crops")
    aug.add_argument(
        "--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="random-resized, or resize-keep-ratio crops"
    )
    aug.add_argument("--hflip", type=share, default=0.5)
    aug.add_argument("--vflip", type=share, default=0.0)
    aug.add_argument("--color-jitter", type=amount, default=0.0)
    aug.add_argument("--auto-augment", help="timm's name of a policy, e.g. rand-m9-mstd0.5-inc1 or original")
    aug.add_argument("--reprob", type=share, default=0.0, help="random erasing")
    aug.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel")
    aug.add_argument(
        "--aug-repeats", type=positive, default=1, help="differently augmented copies of an image in an epoch"
    )
    aug.add_argument("--mixup", type=amount, default=0.0, help="alpha")
    aug.add_argument("--cutmix", type=amount, default=0.0, help="alpha")
    aug.add_argument("--mixup-prob", type=share, default=1.0)
    aug.add_argument("--mixup-switch-prob", type=share, default=0.5, help="of cutmix, where both are on")
    aug.add_argument("--mixup-mode", choices=("batch", "pair", "elem"), default="batch")
    aug.add_argument(
        "--mixup-off-epoch", type=natural, default=0, help="epoch from which on nothing is mixed; 0 for never"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The network."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="dg_resnet18", help="a timm or dg_* name, hf-hub:..., local-dir:..., or a "
                       "folder; dg_ may stand before any timm model that dg_timm.dynamize takes")  # fmt: skip
    flag(model, "--pretrained", False, "start from the published weights")
    model.add_argument(
        "--initial-checkpoint", help="safetensors file or folder to start from; a static one is converted"
    )
    model.add_argument(
        "--model-kwargs",
        nargs="+",
        action=KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="e.g. edge_scale=false block_shortcut=false",
    )
    model.add_argument("--head-init-scale", type=amount, default=1.0, help="multiplies a new classifier's weights")
    model.add_argument("--drop", type=share, help="dropout before the classifier")
    model.add_argument("--drop-path", type=share, help="stochastic depth")
    model.add_argument("--freeze", choices=("none", "backbone", "all-but-graph"), default="none")
    flag(model, "--freeze-norm", False, "leave norm statistics as they are")


def add_optimization_options(parser: argparse.ArgumentParser) -> None:
    """Optimizer and schedule."""
    opt = parser.add_argument_group("optimization")
    opt.add_argument("--epochs", type=positive, default=10)
    opt.add_argument("--updates", type=positive, help="train for so many updates, whatever --epochs says")
    opt.add_argument("--warmup-updates", type=natural, help="with --updates, in place of --warmup-epochs")
    opt.add_argument(
        "--milestone-updates", type=positive, nargs="+", help="with --updates, in place of --decay-milestones"
    )
    opt.add_argument("--batch-size", type=positive, default=64, help="images of an update, over all processes")
    opt.add_argument(
        "--micro-batch", type=positive, help="at most so many images at a time on a process; the rest is accumulated"
    )
    opt.add_argument("--opt", default="sgd", help="any of timm's optimizers")
    opt.add_argument("--opt-kwargs", nargs="+", action=KeyValues, default={}, metavar="KEY=VALUE")
    opt.add_argument("--lr", type=amount, default=0.05)
    opt.add_argument("--lr-base-batch", type=positive, help="batch size that --lr is for; it is scaled to --batch-size")
    opt.add_argument("--lr-base-scale", choices=("linear", "sqrt"), default="linear")
    opt.add_argument(
        "--graph-lr-scale", type=amount, default=1.0, help="learning rate of routers, scales and thresholds / --lr"
    )
    opt.add_argument("--layer-decay", type=share)
    opt.add_argument("--momentum", type=share, default=0.9)
    opt.add_argument(
        "--weight-decay", type=amount, default=5e-5, help="of weights; never of biases, norms and the graph"
    )
    opt.add_argument("--sched", choices=SCHEDULES, default="cosine")
    opt.add_argument("--warmup-epochs", type=amount, default=0.0)
    opt.add_argument("--warmup-lr", type=amount, default=1e-6)
    flag(opt, "--warmup-prefix", False, "warm-up comes before --epochs instead of within")
    opt.add_argument("--min-lr", type=amount, default=0.0)
    opt.add_argument("--cooldown-epochs", type=natural, default=0)
    opt.add_argument("--decay-rate", type=amount, default=0.1)
    opt.add_argument("--decay-epochs", type=amount)
    opt.add_argument("--decay-milestones", type=positive, nargs="+", default=[90, 180, 270])
    opt.add_argument("--clip-grad", type=amount)
    opt.add_argument("--clip-mode", choices=("norm", "value", "agc"), default="norm")
    opt.add_argument("--ema-decay", type=share, help="keep an average of the weights, and evaluate it too")
    flag(opt, "--ema-warmup", True, "let the average's decay grow at the start")
    opt.add_argument("--patience", type=positive, help="epochs without a better evaluation before stopping")


def add_objective_options(parser: argparse.ArgumentParser) -> None:
    """The loss of a classification."""
    loss = parser.add_argument_group("loss")
    loss.add_argument("--smoothing", type=share, default=0.0, help="of labels")
    loss.add_argument("--loss", choices=("ce", "bce"), default="ce")
    loss.add_argument(
        "--distill",
        nargs="?",
        const="static",
        metavar="TEACHER",
        help="learn a teacher's logits; alone: those of the static network that --model was converted from; none: none",
    )
    flag(
        loss,
        "--fix-thresholds",
        False,
        "leave the thresholds of a graph as they are: of a fresh network nothing closes",
    )
    loss.add_argument("--target-cost", type=share, help="mean cost of an image, relative to the static network, that a "
                      "dynamic one learns to keep to by closing edges")  # fmt: skip
    loss.add_argument(
        "--cost-weight", type=amount, default=30.0, help="of the squared distance by which the cost is above the target"
    )
    loss.add_argument(
        "--cost-ramp", type=share, default=0.5, help="part of the training over which the target comes down"
    )
    loss.add_argument(
        "--cost-noise", type=amount, default=1.0, help="of the decisions which blocks run, at the start of the training"
    )
    loss.add_argument("--cost-quiet", type=share, default=0.7, help="part of the training after which it is gone")
    flag(loss, "--skippable", False, "start an identity conversion so that one router's decision skips a block")
    loss.add_argument("--distill-weight", type=share, default=0.5, help="share of the loss")
    loss.add_argument("--distill-temperature", type=above_zero, default=1.0)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How and where to run; none of it belongs to the recipe's idea."""
    run = parser.add_argument_group("run")
    run.add_argument("--recipe", help="YAML file of options, or the name of one in train_scripts/recipes")
    run.add_argument("--output", default="output/train", help="folder of the run")
    run.add_argument(
        "--resume", nargs="?", const="auto", help="auto: the newest checkpoint that is sound; or its folder"
    )
    run.add_argument(
        "--allow-changed", nargs="+", default=[], metavar="OPTION", help="that a resumed run may change, e.g. data"
    )
    run.add_argument("--seed", type=natural, default=0)
    run.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    flag(run, "--channels-last", False, "memory layout of images and weights")
    flag(run, "--compile", False, "torch.compile")
    flag(run, "--grad-checkpointing", False, "recompute activations in the backward pass instead of keeping them")
    flag(run, "--sync-bn", False, "norm statistics of all processes' batches together (GPUs)")
    run.add_argument(
        "--dist-bn",
        choices=("reduce", "broadcast"),
        default="reduce",
        help="norm statistics after an epoch: average, or the main process's",
    )
    run.add_argument("--val-batch-size", type=positive, help="images at a time on a process; by default 64")
    run.add_argument(
        "--save-every", type=natural, default=0, help="updates between checkpoints; one is saved each epoch anyway"
    )
    run.add_argument("--keep", type=positive, default=2, help="newest checkpoints to keep, beside the best")
    run.add_argument("--log-every", type=positive, default=10, help="updates between looks at the loss")
    run.add_argument(
        "--report-to", nargs="+", default=[], help="trackers of Accelerate: tensorboard, wandb, trackio, ..."
    )
    run.add_argument("--dry-run", action="store_true", help="print what would be done, and touch nothing")
