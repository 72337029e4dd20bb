"""What a dynamic backbone costs a detector: the paper's Table 2 (GFLOPs at 800 x 1333), and time on the clock.

    python train_scripts/detection_cost.py                    # multiply-adds of the three backbones, beside the paper
    python train_scripts/detection_cost.py --time --rounds 7 --json results/detection_cost.json
    python train_scripts/detection_cost.py --time --backbones tf_efficientnet_lite0 --size 480 640

The paper counts 2 floating-point operations for a multiply-add, of the backbone alone. --time runs Faster R-CNN over
the static backbone, over its identity conversion, and over a graph in which half of the blocks of every stage are
removed for the image, in sparse execution. They run in turn, one image at a time, in ms. The weights are random, so
what is found says nothing.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dg_timm
from dg_timm._command_line import CommandParser
from dg_timm._errors import BadState, BadValue, UserError
from dg_timm._files import atomic_write
from dg_timm._hardware import describe_hardware
from dg_timm._tables import markdown_table
from dg_timm.benchmarks.imposed import ImposedPaths, open_all_edges
from dg_timm.benchmarks.timing import order_of_round, seconds
from dg_timm.detection.detectors import DetectorConfig, create_detector
from dg_timm.graph.stage import graph_stages
from dg_timm.training.run.option_types import fraction, positive_int

# backbone -> GFLOPs of the paper's Table 2: static, DG-Net
TABLE_2 = {"resnet50": (174, 176), "resnet101": (333, 335), "resnext50_32x4d": (181, 183)}
_PAPER_SIZE = [800, 1333]
_FLOPS = ("backbone", "static GFLOPs", "paper", "off", "DG GFLOPs", "paper", "off")
_TIMES = {"backbone": "backbone", "execution": "execution", "ms an image": "ms", "ratio": "ratio", "25 %": "low",
          "75 %": "high"}  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--backbones", nargs="+", default=list(TABLE_2), help="static timm names")
    parser.add_argument(
        "--size",
        type=positive_int,
        nargs=2,
        default=_PAPER_SIZE,
        metavar=("HEIGHT", "WIDTH"),
        help="height and width of the image in pixels",
    )
    parser.add_argument("--time", action="store_true", help="also time a detector over each backbone")
    parser.add_argument(
        "--removed",
        type=fraction,
        default=0.5,
        help="fraction of the blocks of a stage that sparse execution leaves out",
    )
    parser.add_argument("--rounds", type=positive_int, default=7, help="times that every detector runs")
    parser.add_argument("--device", default="cpu", help="device to run on")
    parser.add_argument("--json", type=Path, help="file to write the results to; by default none")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, and with ``--time`` measure; the exit status."""
    args = parse(argv)
    try:
        check(args)
        flops = [count(name, args.size) for name in args.backbones]
        print(markdown_table(_FLOPS, [flops_cells(row, args.size) for row in flops]), flush=True)
        times = []
        for name in args.backbones if args.time else ():
            print(f"timing detectors over {name} ...", file=sys.stderr, flush=True)
            times += measure(name, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if times:
        print(f"\n{markdown_table(tuple(_TIMES), [[row[key] for key in _TIMES.values()] for row in times])}")
    if args.json:
        result = {
            "command": " ".join(["train_scripts/detection_cost.py", *(sys.argv[1:] if argv is None else argv)]),
            "hardware": describe_hardware(torch.device(args.device)),
            "size": args.size,
            "flops": flops,
            "times": times,
        }
        atomic_write(args.json, json.dumps(result, indent=1) + "\n")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what can't be counted or timed, before anything is printed.

    Raises:
        BadValue: a backbone is not a static timm model that can become dynamic, or there are too few rounds.
    """
    for name in args.backbones:
        if not timm.is_model(name) or name.startswith("dg_"):
            raise BadValue(f"{name} is not a static timm model")
        dg_timm.models.register(f"dg_{name}")
        try:
            timm.create_model(f"dg_{name}", features_only=True, device="meta")
        except (UserError, RuntimeError) as error:  # timm's, where a model has no feature maps
            raise BadValue(f"{name} can't become dynamic as a feature extractor: {error}") from error
    if args.time and args.rounds < 2:
        raise BadValue("--rounds must be at least 2: quartiles need them")


def count(name: str, size: Sequence[int]) -> dict[str, Any]:
    """Count the GFLOPs of a backbone, static and dynamic: twice the multiply-adds of convolutions and edges."""
    found: dict[str, Any] = {"backbone": name}
    for which, prefix in (("static", ""), ("dynamic", "dg_")):
        model = timm.create_model(prefix + name, features_only=True, device="meta")
        multiply_adds = dg_timm.complexity(model, (3, size[0], size[1])).multiply_adds
        found[which] = round(2 * multiply_adds / 1e9, 2)
    return found


def flops_cells(row: Mapping[str, Any], size: Sequence[int]) -> list[object]:
    """The cells of a table's row: each number with the paper's, and how far it is off in percent."""
    cells: list[object] = [row["backbone"]]
    papers = TABLE_2.get(row["backbone"], (None, None)) if list(size) == _PAPER_SIZE else (None, None)
    for flops, paper in zip((row["static"], row["dynamic"]), papers, strict=True):
        cells += [f"{flops:.1f}", paper, None if paper is None else f"{100 * (flops / paper - 1):+.2f} %"]
    return cells


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time detectors over a backbone in turn; the medians, and the medians of the rounds' ratios to the static one.

    Raises:
        BadState: a conversion does not find what the static detector finds; nothing is timed.
    """
    torch.manual_seed(1)
    image = [torch.rand(3, *args.size).to(args.device)]
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.safetensors"
        save_file(timm.create_model(name).state_dict(), file)
        static = _build(name, file, args)
        dense, sparse, cut = (_build(f"dg_{name}", file, args) for _ in range(3))
    for other in (sparse, cut):
        dg_timm.set_execution(other.backbone.body, "sparse")
    _check_equal(name, image, static, {"dense": dense, "sparse": sparse})
    open_all_edges(cut.backbone.body)
    paths = [ImposedPaths(stage) for stage in graph_stages(cut.backbone.body).values()]
    candidates = {
        "static": static,
        "dense, identity": dense,
        "sparse, identity": sparse,
        f"sparse, {100 * args.removed:.0f} % of the blocks removed": cut,
    }
    times = _time_in_turn(candidates, image, paths, args)
    rows = []
    for label, taken in times.items():
        ratios = [b / a for a, b in zip(times["static"], taken, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        rows.append({"backbone": name, "execution": label, "rounds": args.rounds, "ms": round(median(taken), 1),
                     "ratio": round(median(ratios), 3), "low": round(low, 3), "high": round(high, 3)})  # fmt: skip
    return rows


def _build(backbone: str, weights: str, args: argparse.Namespace) -> Any:
    config = DetectorConfig(min_size=(min(args.size),), max_size=max(args.size))
    detector = create_detector("faster_rcnn", backbone, ["object"], [1], config, initial_checkpoint=weights)
    return detector.eval().to(args.device)


def _check_equal(name: str, image: list[Tensor], static: Any, others: Mapping[str, Any]) -> None:
    with torch.inference_mode():
        expected = static(image)[0]
        for execution, other in others.items():
            found = other(image)[0]
            if not all(_same(found[key], value) for key, value in expected.items()):
                raise BadState(f"dg_{name} does not detect what {name} does in {execution} execution; it is not timed")


def _same(found: Tensor, expected: Tensor) -> bool:
    """To rounding: sparse execution sums in another order."""
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), 1e-3, 1e-2)


def _time_in_turn(
    candidates: Mapping[str, nn.Module], image: list[Tensor], paths: Sequence[ImposedPaths], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Milliseconds of each candidate in each round; the order turns round every time, and a first round warms up."""

    def run(detector: nn.Module) -> None:
        with torch.inference_mode():
            detector(image)

    times: dict[str, list[float]] = {label: [] for label in candidates}
    for number in range(args.rounds + 1):
        for path in paths:
            path.draw(1, args.removed)
        for label in order_of_round(candidates, number):
            took = 1000 * seconds(lambda label=label: run(candidates[label]), args.device)  # type: ignore[misc]
            if number:
                times[label].append(took)
    return times
