"""Options of detect.py that train.py does not have."""

import argparse

from dg_timm.detection.data.boxes import BOX_FORMATS
from dg_timm.detection.detectors import DETECTORS
from dg_timm.training.run.arguments import KeyValues, add_reading_options, flag, natural, positive, share


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Where images and boxes come from."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="digits", help="digits (pages of handwritten ones); a folder of images with "
                      "COCO annotation files; or a data set on the Hub, Parquet, or saved by save_to_disk, with the "
                      "columns image and objects")  # fmt: skip
    data.add_argument("--val-data", help="another one to evaluate on; by default a split of --data")
    data.add_argument("--train-split", help="by default train")
    data.add_argument("--val-split", help="by default validation or val, else test")
    data.add_argument("--train-annotations", help="COCO file, where its name is not instances_SPLIT.json")
    data.add_argument("--val-annotations", help="the same of the images to evaluate on")
    data.add_argument("--image-folder", help="of a COCO data set; by default it is looked for")
    data.add_argument("--box-format", choices=BOX_FORMATS, default="coco", help="of bbox in a column objects")
    flag(data, "--drop-bad-boxes", False, "leave out, and count, boxes of zero size or outside their image")
    flag(data, "--skip-empty", False, "leave images without boxes out of training")
    add_reading_options(data)


def add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    """torchvision's augmentation of images and boxes."""
    aug = parser.add_argument_group("augmentation")
    flag(aug, "--augment", True, "all of the following")
    aug.add_argument("--hflip", type=share, default=0.5)
    aug.add_argument("--vflip", type=share, default=0.0)
    aug.add_argument("--photometric", type=share, default=0.0, help="colours")
    aug.add_argument("--crop", type=share, default=0.0, help="crops that keep some boxes (SSD's)")
    aug.add_argument("--zoom-out", type=share, default=0.0, help="the image on a larger canvas")


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """The detector and its backbone."""
    model = parser.add_argument_group("detector")
    model.add_argument("--detector", choices=tuple(DETECTORS), default="faster_rcnn")
    model.add_argument("--model", default="dg_resnet50", help="the backbone: a timm or dg_* name, hf-hub:..., "
                       "local-dir:..., or a folder that train.py saved")  # fmt: skip
    flag(model, "--pretrained", False, "start from the backbone's published weights")
    model.add_argument(
        "--initial-checkpoint",
        help="safetensors file or folder for the backbone, or a saved detector's folder; a static one is converted",
    )
    model.add_argument("--model-kwargs", nargs="+", action=KeyValues, default={}, metavar="KEY=VALUE")
    model.add_argument(
        "--min-size", type=positive, nargs="+", default=[800], help="pixels of the shorter side; of several, one is "
        "drawn for each image of training, and evaluation takes the last"
    )  # fmt: skip
    model.add_argument("--max-size", type=positive, default=1333, help="pixels of the longer side, at most")
    model.add_argument("--fpn-channels", type=positive, default=256)
    model.add_argument("--anchor-size", type=_anchor, default=32, help="pixels of the smallest anchors")
    model.add_argument(
        "--roi-batch", type=positive, default=512, help="regions of an image that Faster R-CNN learns from"
    )
    model.add_argument("--freeze-levels", type=int, choices=range(5), default=0, help="freeze the stem and so many of "
                       "the four feature levels (1 is Detectron2's default)")  # fmt: skip
    flag(model, "--freeze-norm", False, "freeze the norms that came with the backbone, weights and statistics")


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """What is left to look at."""
    results = parser.add_argument_group("results")
    results.add_argument(
        "--evaluate",
        metavar="FOLDER",
        help="do not train: evaluate a detector that was saved (its own "
        "--model, --detector and sizes); results are written only where --output is given",
    )
    results.add_argument("--execution", choices=("dense", "sparse"), default="dense", help="of --evaluate")
    results.add_argument("--pictures", type=natural, default=4, help="images to draw with predictions and wiring")
    results.add_argument("--picture-score", type=share, default=0.5, help="least score of the predictions drawn")


def _anchor(text: str) -> int:
    value = positive(text)
    if value % 4:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 4")
    return value
