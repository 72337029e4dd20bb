"""The options of detect.py: those of detection, beside those that every training has."""

import argparse

from dg_timm.detection.data.boxes import BOX_FORMATS
from dg_timm.detection.detectors import DETECTORS
from dg_timm.training.run.data_options import add_reading_options
from dg_timm.training.run.option_types import KeyValues, flag, fraction, non_negative_int, positive_int

# Options of detection that change nothing of the weights: a resumed run may differ in them.
SHOWN_OPTIONS = frozenset({"pictures", "picture_score", "evaluate", "execution"})


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add where images and boxes come from."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        help="data set: digits (pages of handwritten digits); a folder of images with COCO annotation files; or a "
        "data set of the Hub, of Parquet files, or saved by save_to_disk, with the columns image and objects; by "
        "default none, and one has to be named",
    )
    data.add_argument("--val-data", help="another data set to evaluate on; by default a split of --data")
    data.add_argument("--train-split", help="name of the split to train on; by default train")
    data.add_argument("--val-split", help="name of the split to evaluate on; by default validation or val, else test")
    data.add_argument(
        "--train-annotations", help="COCO file to train on; by default instances_SPLIT.json and similar names"
    )
    data.add_argument("--val-annotations", help="COCO file to evaluate on; by default as --train-annotations")
    data.add_argument("--image-folder", help="folder of a COCO data set's images; by default the usual ones are tried")
    data.add_argument(
        "--box-format", choices=BOX_FORMATS, default="coco", help="format of the boxes in a column of objects"
    )
    flag(data, "--drop-bad-boxes", False, "leave out, and count, boxes of zero size or outside their image")
    flag(data, "--skip-empty", False, "leave images without boxes out of training")
    add_reading_options(data)


def add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    """Add torchvision's augmentation of images and boxes."""
    aug = parser.add_argument_group("augmentation")
    flag(aug, "--augment", True, "augment images with all of the following")
    aug.add_argument("--hflip", type=fraction, default=0.5, help="probability of flipping left and right")
    aug.add_argument("--vflip", type=fraction, default=0.0, help="probability of flipping top and bottom")
    aug.add_argument("--photometric", type=fraction, default=0.0, help="probability of changing colors")
    aug.add_argument("--crop", type=fraction, default=0.0, help="probability of a crop that keeps some boxes (SSD's)")
    aug.add_argument(
        "--zoom-out", type=fraction, default=0.0, help="probability of placing the image on a larger canvas"
    )


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """Add the detector and its backbone."""
    model = parser.add_argument_group("detector")
    model.add_argument(
        "--detector", choices=tuple(DETECTORS), default="faster_rcnn", help="torchvision's detector to build"
    )
    model.add_argument(
        "--model",
        default="dg_resnet50",
        help="backbone: a timm or dg_* name, hf-hub:..., local-dir:..., or a folder that train.py saved",
    )
    flag(model, "--pretrained", False, "start from the backbone's published weights")
    model.add_argument(
        "--initial-checkpoint",
        help="weights to start from: a safetensors file or folder for the backbone, or the folder of a saved detector; "
        "static weights are converted; by default none",
    )
    model.add_argument(
        "--model-kwargs",
        nargs="+",
        action=KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="further arguments of the backbone, e.g. edge_scale=false block_shortcut=false; by default none",
    )
    model.add_argument(
        "--min-size",
        type=positive_int,
        nargs="+",
        default=[800],
        help="length of the shorter side of an image in pixels; of several, training draws one for each image, and "
        "evaluation takes the last",
    )
    model.add_argument(
        "--max-size", type=positive_int, default=1333, help="largest length of the longer side in pixels"
    )
    model.add_argument("--fpn-channels", type=positive_int, default=256, help="channels of every level of the pyramid")
    model.add_argument("--anchor-size", type=_multiple_of_4, default=32, help="side of the smallest anchors in pixels")
    model.add_argument(
        "--roi-batch", type=positive_int, default=512, help="regions of an image from which Faster R-CNN learns"
    )
    model.add_argument(
        "--freeze-levels",
        type=int,
        choices=range(5),
        default=0,
        help="freeze the stem and this many of the four feature levels; Detectron2 freezes 1",
    )
    flag(model, "--freeze-norm", False, "freeze weights and statistics of the norms that came with the backbone")


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add what is evaluated, and what is left to look at."""
    results = parser.add_argument_group("results")
    results.add_argument(
        "--evaluate",
        metavar="FOLDER",
        help="evaluate a saved detector instead of training (with its own --model, --detector and sizes); results are "
        "written only if --output is given; by default train",
    )
    results.add_argument(
        "--execution", choices=("dense", "sparse"), default="dense", help="execution of the backbone under --evaluate"
    )
    results.add_argument(
        "--pictures", type=non_negative_int, default=4, help="number of images to draw with predictions and wiring"
    )
    results.add_argument(
        "--picture-score", type=fraction, default=0.5, help="lowest score of a prediction that is drawn"
    )


def _multiple_of_4(text: str) -> int:
    value = positive_int(text)
    if value % 4:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 4")
    return value
