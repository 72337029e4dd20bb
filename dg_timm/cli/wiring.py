"""Draw the wiring of pictures: one row a picture, one panel a stage.

    dg-timm show dg_cifar_resnet26.cifar10 picture.png
    dg-timm show output/train/model cat.jpg dog.jpg --output wiring.png --json

Squares are a stage's input and output, circles its blocks, arcs its edges. The width of an arc is the edge's weight;
red is more than for the other pictures, blue less. A closed edge is not drawn.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform

from dg_timm._command_line import CommandParser
from dg_timm._errors import BadValue
from dg_timm.analysis.counting import count_costs, recorded_cost
from dg_timm.analysis.plot import draw_wiring
from dg_timm.analysis.recorder import recording
from dg_timm.cli.errors import cli_errors
from dg_timm.cli.loading import class_names, load_network
from dg_timm.cli.pictures import Bad, Pictures, find_pictures
from dg_timm.graph.stage import graph_stages
from dg_timm.training.run.option_types import positive_int

MOST_PICTURES = 20


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="dynamic network: a dg_* name, hf-hub:..., or a folder")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE|FOLDER", help=f"pictures; the first {MOST_PICTURES} are drawn"
    )
    parser.add_argument("--output", type=Path, default=Path("wiring.png"), help="PNG file for the picture")
    parser.add_argument("--checkpoint", help="weights in place of the published ones; by default those")
    parser.add_argument("--image-size", type=positive_int, help="height and width in pixels; by default the network's")
    parser.add_argument("--json", action="store_true", help="print what each picture runs as JSON lines")
    return parser.parse_args(argv)


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Draw; return the exit status."""
    args = parse(argv)
    files = find_pictures(args.images)[:MOST_PICTURES]
    model, config = load_network(args.model, args.checkpoint, args.image_size)
    if not graph_stages(model):
        raise BadValue(f"{args.model} is static and has no wiring; dg-timm convert makes it dynamic")
    images = []
    for item in Pictures(files, create_transform(**config), model.in_chans):  # type: ignore[attr-defined]
        if isinstance(item, Bad):
            raise BadValue(f"{item.file} can't be read: {item.reason}")
        images.append(item[1])
    batch = torch.stack(images)
    with torch.inference_mode(), recording(model) as recorder:
        found = model(batch).argmax(1).tolist()
    alphas = recorder.recorded
    costs = recorded_cost(model, recorder, count_costs(model, config["input_size"])).tolist()
    names = class_names(model)
    labels = [names[k] for k in found]
    titles = [f"{label.partition(',')[0]}\ncost {cost:.2f}" for label, cost in zip(labels, costs, strict=True)]
    draw_wiring(alphas, args.output, images=batch, titles=titles)
    for k, file in enumerate(files):
        edges = {name: int((alpha[k] != 0).sum()) for name, alpha in alphas.items()}
        row: dict[str, Any] = {"file": file, "class": labels[k], "cost": round(costs[k], 4), "open_edges": edges}
        print(json.dumps(row) if args.json else f"{file}: {labels[k]}, cost {costs[k]:.3f}, open edges {_spell(edges)}")
    if not args.json:
        print(f"picture: {args.output}")
    return 0


def _spell(edges: dict[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in edges.items())
