"""Classify pictures: the most likely classes by name, the cost of each picture, and milliseconds.

Of a network that was trained on several labels: all classes whose probability is at least 0.5, however many.

    dg-timm predict dg_cifar_resnet26.cifar10 picture.png
    dg-timm predict output/train/model pictures/ --output predictions.csv --top-k 3
    dg-timm predict hf-hub:org/name pictures/ --execution sparse --output predictions.parquet

A row has the file, its classes with their probabilities, the cost (multiply-adds relative to the static network; of
dynamic networks alone), and the milliseconds that the network took for an image of its batch. Preprocessing is the
network's own. Without --output the rows are printed. A file is written beside its place and renamed at the end.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from dg_timm._command_line import CommandParser
from dg_timm._errors import BadValue
from dg_timm.analysis.counting import count_costs, recorded_cost
from dg_timm.analysis.recorder import record, recording
from dg_timm.cli.errors import cli_errors
from dg_timm.cli.loading import class_names, load_network
from dg_timm.cli.pictures import PictureBatch, Pictures, collate_pictures, find_pictures
from dg_timm.cli.row_files import Row, open_rows, row_file
from dg_timm.execution.settings import set_execution
from dg_timm.graph.stage import graph_stages
from dg_timm.hub.labeling import labeling_of
from dg_timm.training.run.option_types import flag, non_negative_int, positive_int

_USUAL = 5  # classes of a picture that has one


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="network: a timm or dg_* name, hf-hub:..., or a folder")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="pictures, or folders of them")
    result = parser.add_argument_group("result")
    result.add_argument(
        "--top-k",
        type=positive_int,
        help="number of classes a picture, the likeliest first; by default 5, and of several labels all from 0.5 on",
    )
    result.add_argument("--output", help="file ending with .csv, .json or .parquet; by default rows are printed")
    result.add_argument("--json", action="store_true", help="print rows as JSON lines, in place of CSV")
    result.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        default="stop",
        help="stop: an unreadable picture ends the command; skip: it is named, counted and left out",
    )
    network = parser.add_argument_group("network")
    network.add_argument("--checkpoint", help="weights in place of the published ones; by default those")
    network.add_argument("--image-size", type=positive_int, help="height and width in pixels; by default the network's")
    network.add_argument(
        "--execution", choices=("dense", "sparse"), default="dense", help="sparse: what is closed does not run"
    )
    flag(network, "--cost", True, "count the cost of dynamic networks; in sparse execution this is a second pass")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--batch-size", type=positive_int, default=32, help="number of pictures at a time")
    speed.add_argument("--workers", type=non_negative_int, default=2, help="number of decoding processes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speed.add_argument("--device", default=device, help="device of the network")
    return parser.parse_args(argv)


class Predictor:
    """A network that makes rows of batches.

    Args:
        args: options of the command.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = _device(args.device)
        self.model, self.config = load_network(args.model, args.checkpoint, args.image_size)
        self.names = class_names(self.model)
        self.independent = labeling_of(self.model).independent
        self.top_k = args.top_k
        self.model.to(self.device)
        stages = graph_stages(self.model)
        self.costs = None
        if stages and args.cost:
            self.costs = count_costs(self.model, self.config["input_size"])
        self.sparse = args.execution == "sparse"
        if self.sparse:
            if not stages:
                raise BadValue(f"--execution sparse: {args.model} is static; leave the option out")
            set_execution(self.model, "sparse")

    def run(self, images: Tensor) -> tuple[Tensor, Tensor | None, float]:
        """Run the network: logits, cost of each image (None if it isn't counted), and seconds."""
        is_recorded = self.costs is not None and not self.sparse
        guard: Any = recording(self.model) if is_recorded else contextlib.nullcontext()
        start = time.perf_counter()
        with guard as recorder:
            logits = self.model(images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        if self.costs is None:
            return logits, None, seconds
        if self.sparse:
            recorder = record(self.model, images)
        return logits, recorded_cost(self.model, recorder, self.costs), seconds

    @torch.inference_mode()
    def rows(self, files: Sequence[str], images: Tensor) -> list[Row]:
        """Make the rows of a batch."""
        logits, costs, seconds = self.run(images.to(self.device, non_blocking=True))
        found = self._classes(logits.float().cpu())
        price = [] if costs is None else costs.tolist()
        made = []
        for k, file in enumerate(files):
            row: Row = {"file": file, **found[k]}
            if price:
                row["cost"] = round(price[k], 6)
            row["ms"] = round(1000 * seconds / len(files), 4)
            made.append(row)
        return made

    def _classes(self, logits: Tensor) -> list[Row]:
        """Name the classes of every image with their probabilities, the likeliest first.

        Args:
            logits: (batch, classes).

        Returns:
            a row of columns for each image: class_1, score_1 and so on; or ``labels`` and ``scores``, lists as long as
            they come out, where each class has a probability of its own.
        """
        probabilities = logits.sigmoid() if self.independent else logits.softmax(1)
        scores, classes = probabilities.sort(dim=1, descending=True, stable=True)
        rows: list[Row] = []
        for of_image, ranked in zip(scores.tolist(), classes.tolist(), strict=True):
            count = self.top_k or (sum(score >= 0.5 for score in of_image) if self.independent else _USUAL)
            best = [(self.names[label], round(score, 6)) for label, score in zip(ranked, of_image, strict=True)][:count]
            if self.independent:
                rows.append({"labels": [name for name, _ in best], "scores": [score for _, score in best]})
            else:
                pairs = [{f"class_{k}": name, f"score_{k}": score} for k, (name, score) in enumerate(best, start=1)]
                rows.append({key: value for pair in pairs for key, value in pair.items()})
        return rows


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # also of a torch without CUDA
        raise BadValue(f"--device {name} can't be used here: {str(error).splitlines()[0]}") from error


def _batches(predictor: Predictor, files: Sequence[str], args: argparse.Namespace) -> Iterator[PictureBatch]:
    pictures = Pictures(files, create_transform(**predictor.config), predictor.model.in_chans)
    workers = min(args.workers, -(-len(files) // args.batch_size) - 1)  # one batch does not wait for a process
    yield from DataLoader(
        pictures,
        args.batch_size,
        num_workers=workers,
        collate_fn=collate_pictures,
        pin_memory=predictor.device.type == "cuda",
    )


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Predict; return the exit status."""
    args = parse(argv)
    path = row_file(args.output) if args.output else None
    files = find_pictures(args.images)
    predictor = Predictor(args)
    done = skipped = 0
    start = time.perf_counter()
    with open_rows(path, as_json=args.json) as write, tqdm(total=len(files), unit="image", disable=None) as bar:
        for batch in _batches(predictor, files, args):
            for bad in batch.bad:
                if args.on_bad_image == "stop":
                    raise BadValue(f"{bad.file} can't be read: {bad.reason}; --on-bad-image skip leaves it out")
                bar.write(f"left out {bad.file}: {bad.reason}", file=sys.stderr)
            if batch.images is not None:
                write(predictor.rows(batch.files, batch.images))
            done, skipped = done + len(batch.files), skipped + len(batch.bad)
            bar.update(len(batch.files) + len(batch.bad))
    if not done:
        raise BadValue(f"none of the {skipped} pictures can be read")
    seconds = time.perf_counter() - start
    left_out = f", {skipped} left out" if skipped else ""
    where = f"; {path}" if path else ""
    print(f"{done} pictures in {seconds:.1f} s ({done / seconds:.1f} a second){left_out}{where}", file=sys.stderr)
    return 0
