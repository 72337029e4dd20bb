"""What an evaluation leaves to read: predictions, a table by class, numbers and pictures."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dg_timm._files import atomic_write
from dg_timm.detection.data.boxes import Categories, DetectionSplit
from dg_timm.detection.evaluation import APResult, Detections, coco_results
from dg_timm.detection.plot import draw_detections

PREDICTIONS, PER_CLASS, FIGURES, PICTURES = "predictions.json", "per_class.csv", "figures.json", "detections.png"
RESULT_FILES = (PREDICTIONS, PER_CLASS, FIGURES, PICTURES)


def write_results(
    output: Path,
    detector: Any,
    split: DetectionSplit,
    categories: Categories,
    result: APResult,
    found: Sequence[Detections],
    *,
    pictures: int = 0,
    min_score: float = 0.5,
) -> None:
    """Write predictions.json (COCO's format of results), per_class.csv, figures.json and detections.png.

    Args:
        output: the folder of the files; it is made, and files of these names are replaced.
        detector: draws its wiring for the pictures.
        split, categories: the images and their classes.
        result, found: from :func:`dg_timm.detection.evaluation.evaluate_detector`.
        pictures: how many images to draw, from all over the split.
        min_score: draw predictions of at least this score, 0..1.
    """
    atomic_write(output / PREDICTIONS, json.dumps(coco_results(found, split, categories)) + "\n")
    atomic_write(output / PER_CLASS, _class_csv(result))
    figures = {"split": split.name, "images": len(found), **result.overall}
    atomic_write(output / FIGURES, json.dumps(figures, indent=1) + "\n")
    if pictures:
        step = max(len(found) // pictures, 1)
        chosen = found[::step][:pictures]
        draw_detections(detector, split, chosen, categories, output / PICTURES, min_score=min_score)


def _class_csv(result: APResult) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["category", "boxes", "AP", "AP50", "AP75"])
    writer.writerows([one.name, one.boxes, *(f"{value:.4f}" for value in one[2:])] for one in result.classes)
    return table.getvalue()


def class_table(result: APResult) -> str:
    """The average precision of each class as lines of text, in aligned columns."""
    width = max((len(one.name) for one in result.classes), default=0)
    lines = [f"{'':{width}} {'boxes':>7} {'AP':>7} {'AP50':>7} {'AP75':>7}"]
    for one in result.classes:
        lines.append(f"{one.name:{width}} {one.boxes:7} {one.AP:7.2f} {one.AP50:7.2f} {one.AP75:7.2f}")
    return "\n".join(lines)
