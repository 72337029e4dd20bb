"""What a dynamic backbone costs a detector: the paper's Table 2 (GFLOPs at 800 x 1333), and time on the clock.

python train_scripts/detection_cost.py                        # multiply-adds of the three backbones, beside the paper
python train_scripts/detection_cost.py --time --rounds 7 --json results/detection_cost.json
python train_scripts/detection_cost.py --time --backbones tf_efficientnet_lite0 --size 480 640

The paper counts 2 floating-point operations for a multiply-add, of the backbone alone. --time runs Faster R-CNN over
the static backbone, over its identity conversion, and over a graph in which half of the blocks of every stage are
removed for the image, sparse; in turn, one image at a time, in ms. Random weights: what is found says nothing.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dg_timm
from dg_timm.analysis.counting import complexity
from dg_timm.benchmarks.networks import ImposedPaths, seconds
from dg_timm.detection.detectors import Options, create_detector
from dg_timm.graph.stage import graph_stages, routers
from dg_timm.training.run.arguments import positive, share

# backbone -> GFLOPs of the paper's Table 2: static, DG-Net
TABLE_2 = {"resnet50": (174, 176), "resnet101": (333, 335), "resnext50_32x4d": (181, 183)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=list(TABLE_2), help="static timm names")
    parser.add_argument("--size", type=positive, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--time", action="store_true", help="also run a detector over each")
    parser.add_argument("--removed", type=share, default=0.5, help="share of the blocks, in sparse execution")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in args.backbones:
        if timm.is_model(name) and not name.startswith("dg_"):
            try:
                dg_timm.models.registry.register_twin(f"dg_{name}")
                timm.create_model(f"dg_{name}", features_only=True, device="meta")
            except Exception as error:
                print(f"error: {name} can't become dynamic as a feature extractor: {error}", file=sys.stderr)
                return 2
    unknown = [name for name in args.backbones if not timm.is_model(name) or name.startswith("dg_")]
    if unknown:
        print(f"error: {unknown[0]} is no static timm model", file=sys.stderr)
        return 2
    if args.time and args.rounds < 2:
        print("error: --rounds must be at least 2: quartiles need them", file=sys.stderr)
        return 2
    print("| backbone | static GFLOPs | paper | off | DG GFLOPs | paper | off |\n|---|---|---|---|---|---|---|")
    rows = [count(name, args) for name in args.backbones]
    times = []
    if args.time:
        print("\n| backbone | execution | ms an image | ratio | quartile | to |\n|---|---|---|---|---|---|")
        for name in args.backbones:
            times += measure(name, args)
    if args.json:
        result = {
            "command": " ".join(["train_scripts/detection_cost.py", *sys.argv[1:]]),
            "hardware": f"{torch.get_num_threads()} threads on {os.cpu_count()} CPU cores ({platform.machine()})"
            if args.device == "cpu" else torch.cuda.get_device_name(),
            "size": args.size, "flops": rows, "times": times,
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        beside = args.json.with_suffix(".tmp")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(args.json)
    return 0


def count(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Twice the multiply-adds of the backbone's convolutions and edges, and how far from the paper, in percent."""
    found: dict[str, Any] = {"backbone": name}
    cells = []
    for which, place in (("static", 0), ("dynamic", 1)):
        model = timm.create_model(("dg_" if place else "") + name, features_only=True, device="meta")
        flops = 2 * complexity(model, (3, *args.size)).multiply_adds / 1e9
        found[which] = round(flops, 2)
        paper = TABLE_2.get(name, (None, None))[place] if args.size == [800, 1333] else None
        off = "" if paper is None else f"{100 * (flops / paper - 1):+.2f} %"
        cells.append(f"{flops:.1f} | {paper or ''} | {off}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return found


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Median times of detectors in turn, and the medians of the rounds' ratios to the static one."""
    torch.manual_seed(1)
    height, width = args.size
    image = [torch.rand(3, height, width).to(args.device)]
    options = Options(min_size=(min(args.size),), max_size=max(args.size))

    def build(backbone: str, **weights: Any) -> Any:
        return create_detector("faster_rcnn", backbone, ["object"], [1], options, **weights).eval().to(args.device)

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.safetensors"
        save_file(timm.create_model(name).state_dict(), file)
        static = build(name, initial_checkpoint=file)
        dense, sparse, cut = (build(f"dg_{name}", initial_checkpoint=file) for _ in range(3))
    for other in (sparse, cut):
        dg_timm.set_execution(other.backbone.body, "sparse")
    with torch.inference_mode():
        wanted = static(image)[0]
        for label, other in (("dense", dense), ("sparse", sparse)):
            got = other(image)[0]
            if not all(same(got[key], value) for key, value in wanted.items()):
                raise SystemExit(f"dg_{name} does not detect what {name} does in {label} execution; it is not timed")
    for router in routers(cut.backbone.body).values():
        router.reset_parameters(identity=False)
    paths = [ImposedPaths(stage) for stage in graph_stages(cut.backbone.body).values()]
    contestants = {"static": static, "dense, identity": dense, "sparse, identity": sparse,
                   f"sparse, {100 * args.removed:.0f} % of the blocks removed": cut}  # fmt: skip
    times: dict[str, list[float]] = {label: [] for label in contestants}

    def run(detector: nn.Module) -> None:
        with torch.inference_mode():
            detector(image)

    for number in range(args.rounds + 1):  # the first one warms up
        for path in paths:
            path.draw(1, args.removed, "sparse")
        labels = list(contestants)
        for label in labels if number % 2 else reversed(labels):
            took = 1000 * seconds(lambda label=label: run(contestants[label]), args.device)  # type: ignore[misc]
            if number:
                times[label].append(took)
    rows = []
    for label, taken in times.items():
        ratios = [b / a for a, b in zip(times["static"], taken, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        row = {"backbone": name, "execution": label, "rounds": args.rounds, "ms": round(median(taken), 1),
               "ratio": round(median(ratios), 3), "low": round(low, 3), "high": round(high, 3)}  # fmt: skip
        rows.append(row)
        print(f"| {name} | {label} | {row['ms']} | {row['ratio']} | {row['low']} | {row['high']} |", flush=True)
    return rows


def same(got: Tensor, wanted: Tensor) -> bool:
    """To rounding: sparse execution sums in another order."""
    return got.shape == wanted.shape and torch.allclose(got.float(), wanted.float(), 1e-3, 1e-2)
