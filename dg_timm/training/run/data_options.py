"""The options of images: where they come from, how they are prepared, and how they are augmented."""

import argparse

from dg_timm._errors import BadValue
from dg_timm.hub.labeling import LOSSES, Labeling
from dg_timm.training.run.option_types import (
    OptionGroup,
    finite_float,
    flag,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_int,
)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add where images come from."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        help="data set: digits (scikit-learn's); a folder of images (a folder for each class, also below train, val, "
        "validation or test), of Parquet files, of webdataset shards, or saved by save_to_disk; a .parquet or .tar "
        "file, also by its address (s3://bucket/train-*.tar); a .csv of file names and labels; or a data set on the "
        "Hub; by default none, and one has to be named",
    )
    data.add_argument("--val-data", help="another data set to evaluate on; by default a split of --data")
    data.add_argument("--train-split", help="name of the split to train on; by default train")
    data.add_argument(
        "--val-split",
        help="name of the split to evaluate on; by default validation, else test, else a fifth of every class is set "
        "aside. Nothing is both learned and evaluated on",
    )
    data.add_argument("--image-key", help="name of the column of images; by default the only one, or image")
    data.add_argument(
        "--label-key",
        help="name of the column of labels, or a,b,c: a column for each class; by default the only one, or label",
    )
    data.add_argument("--label-names", help="text file with a class name a line; by default those of the data set")
    data.add_argument("--num-classes", type=positive_int, help="number of classes; by default that of the data set")
    flag(data, "--streaming", False, "read rows as they are needed; the data set may be larger than the disk")
    data.add_argument(
        "--shuffle-buffer",
        type=positive_int,
        default=2048,
        help="number of undecoded rows of a stream that are shuffled together",
    )
    data.add_argument(
        "--epoch-size",
        type=positive_int,
        help="number of rows in an epoch of a stream, for the schedule; by default what the data set tells",
    )
    add_reading_options(data)


def add_task_options(parser: argparse.ArgumentParser, task: str | None) -> None:
    """Add what labels are.

    Args:
        task: default of ``--task``; None is that of the network.
    """
    labels = parser.add_argument_group("labels")
    default = "" if task else "; by default that of the network"
    labels.add_argument(
        "--task",
        choices=tuple(LOSSES),
        default=task,
        help=f"single: a row has one class; multilabel: any number of classes; soft: a share of every class{default}",
    )
    labels.add_argument(
        "--label-separator",
        metavar="CHARACTER",
        help="what separates the names in a text of several labels; by default |",
    )


def labeling_of_options(args: argparse.Namespace) -> Labeling:
    """Return what a training is to say of images; the loss that was not given is the usual one of the task.

    Raises:
        BadValue: for a loss that is not one of the task's.
    """
    usual, *others = LOSSES[args.task]
    loss = args.loss or usual
    if loss not in (usual, *others):
        raise BadValue(f"--loss {loss} is not for --task {args.task}, which has {', '.join((usual, *others))}")
    if loss == "zlpr" and (args.smoothing or args.mixup or args.cutmix):
        raise BadValue(
            "--loss zlpr takes labels of 0 and 1 alone: leave --mixup and --cutmix out, and give --smoothing 0"
        )
    return Labeling(args.task, loss)


def add_summary_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that shows the data in place of training on them."""
    parser.add_argument(
        "--data-summary",
        nargs="?",
        const="data_summary.png",
        metavar="FILE",
        help="print the source, the rows of each split, the classes and what was left out, save a picture of 16 "
        "samples (data_summary.png without a FILE), and stop; by default training begins",
    )


def require_data(args: argparse.Namespace) -> None:
    """Raise BadValue if neither the command line nor its recipe names the data."""
    if args.data is None:
        raise BadValue("--data is missing: a folder, a file, or a data set on the Hub; or digits, to try things out")


def add_reading_options(data: OptionGroup) -> None:
    """Add how much of the data is read, by whom, and what becomes of images that can't be decoded."""
    data.add_argument(
        "--train-limit", type=positive_int, help="train on this number of images, chosen at random; by default on all"
    )
    data.add_argument(
        "--val-limit", type=positive_int, help="evaluate on this number of images, chosen at random; by default on all"
    )
    data.add_argument(
        "--on-bad-image",
        choices=("error", "skip"),
        default="error",
        help="error: an unreadable image or a row without a valid label ends the run; skip: it is left out and "
        "reported",
    )
    data.add_argument(
        "--workers",
        type=non_negative_int,
        default=2,
        help="number of decoding processes for each training process; 0 decodes in the training process",
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add preprocessing."""
    images = parser.add_argument_group("preprocessing")
    own = "by default the network's own"
    images.add_argument("--image-size", type=positive_int, help=f"height and width of the images in pixels; {own}")
    images.add_argument("--in-chans", type=int, choices=(1, 3, 4), help=f"number of channels of the images; {own}")
    images.add_argument(
        "--mean", type=finite_float, nargs="+", help=f"mean of every channel, whose values are in 0..1; {own}"
    )
    images.add_argument("--std", type=finite_float, nargs="+", help=f"standard deviation of every channel; {own}")
    images.add_argument(
        "--interpolation",
        choices=("nearest", "bilinear", "bicubic"),
        help=f"interpolation by which images are resized; {own}",
    )
    images.add_argument("--crop-pct", type=fraction, help=f"fraction of the resized image that evaluation sees; {own}")


def add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    """Add timm's augmentation."""
    aug = parser.add_argument_group("augmentation")
    flag(aug, "--augment", True, "augment images with random crops and all of the following")
    aug.add_argument(
        "--scale",
        type=finite_float,
        nargs=2,
        default=[0.08, 1.0],
        metavar=("LEAST", "MOST"),
        help="area of a random crop, as a fraction of the image",
    )
    aug.add_argument(
        "--ratio",
        type=finite_float,
        nargs=2,
        default=[3 / 4, 4 / 3],
        metavar=("LEAST", "MOST"),
        help="width / height of a random crop",
    )
    aug.add_argument(
        "--train-crop-mode",
        choices=("rrc", "rkrc", "rkrr"),
        help="timm's kind of crop: random resized (rrc), or one that keeps the image's ratio; by default rrc",
    )
    aug.add_argument(
        "--size-schedule",
        type=positive_int,
        nargs="+",
        metavar="SIZE",
        help="heights and widths of the training images in pixels, one after the other over equal parts of the epochs; "
        "evaluation stays at --image-size, and so do by default all epochs",
    )
    aug.add_argument("--hflip", type=fraction, default=0.5, help="probability of flipping left and right")
    aug.add_argument("--vflip", type=fraction, default=0.0, help="probability of flipping top and bottom")
    aug.add_argument("--color-jitter", type=non_negative_float, default=0.0, help="strength of random color changes")
    aug.add_argument(
        "--auto-augment", help="timm's name of a policy, e.g. rand-m9-mstd0.5-inc1 or original; by default none"
    )
    aug.add_argument("--reprob", type=fraction, default=0.0, help="probability of erasing a random rectangle")
    aug.add_argument(
        "--remode", choices=("const", "rand", "pixel"), default="pixel", help="what fills an erased rectangle"
    )
    aug.add_argument(
        "--aug-repeats",
        type=positive_int,
        default=1,
        help="number of differently augmented copies of an image in an epoch",
    )
    _add_mixing_options(aug)


def _add_mixing_options(aug: OptionGroup) -> None:
    aug.add_argument("--mixup", type=non_negative_float, default=0.0, help="alpha of mixup; 0 turns it off")
    aug.add_argument("--cutmix", type=non_negative_float, default=0.0, help="alpha of cutmix; 0 turns it off")
    aug.add_argument("--mixup-prob", type=fraction, default=1.0, help="probability that a batch is mixed")
    aug.add_argument(
        "--mixup-switch-prob", type=fraction, default=0.5, help="probability of cutmix, where mixup is on as well"
    )
    aug.add_argument(
        "--mixup-mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="draw the mixing factor for a batch, for a pair of images, or for each image",
    )
    aug.add_argument(
        "--mixup-off-epoch",
        type=non_negative_int,
        default=0,
        help="epoch from which on nothing is mixed; 0 mixes in all epochs",
    )
