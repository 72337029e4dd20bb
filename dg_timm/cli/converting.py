"""Make a timm model or checkpoint dynamic without changing a prediction, and save it in Hub layout.

    dg-timm convert resnet18.a1_in1k --output my-network
    dg-timm convert trainer-output/checkpoint-500 --output my-network
    dg-timm convert weights.pth --arch convnext_tiny --output my-network

A checkpoint is a folder with config.json and weights, as timm, train.py and transformers' Trainer save it, or a file of
weights (safetensors, or a pickle, of which only tensors are read) with --arch. The predictions of both networks are
compared before anything is written.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dg_timm._command_line import CommandParser
from dg_timm._errors import BadState, BadValue
from dg_timm.analysis.counting import complexity
from dg_timm.cli.errors import cli_errors
from dg_timm.conversion.convert import dynamize
from dg_timm.graph.stage import graph_stages
from dg_timm.hub.card import Card
from dg_timm.hub.layout import managed_files
from dg_timm.hub.save import save_pretrained
from dg_timm.models.registry import try_register
from dg_timm.training.run import networks


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("source", metavar="MODEL|CHECKPOINT", help="a timm name, hf-hub:..., a folder, or a file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="new folder for the network")
    parser.add_argument("--arch", help="timm's name of the model in a file of weights; by default config.json tells")
    parser.add_argument("--random", action="store_true", help="take random weights, not the published ones of a name")
    parser.add_argument("--json", action="store_true", help="print what was done as a line of JSON")
    return parser.parse_args(argv)


def load_static(source: str, arch: str | None = None, random: bool = False) -> Any:
    """Make the static network of a name or checkpoint.

    Raises:
        BadValue: for whatever can't be loaded, or is dynamic already.
    """
    path = Path(source.removeprefix("local-dir:"))
    if path.is_dir():
        arch = str(networks.read_config(path).get("architecture", ""))
        if arch.startswith("dg_"):
            raise BadValue(f"{path} is a dynamic network ({arch}) already")
        return networks.load_folder(path)
    if path.is_file():
        if arch is None:
            raise BadValue(f"{source} does not tell which model it is of; give --arch, e.g. --arch resnet18")
        return networks.load_file(arch, {}, path)
    return networks.create(source, pretrained=not random and not networks.implies_pretrained(source))


def convert_network(model: Any, source: str, folder: Path) -> dict[str, Any]:
    """Convert a static network in place, compare, and save it; return what was done.

    Raises:
        BadValue: if it has no stage to convert, or is dynamic.
        BadState: if it predicts something else; nothing is written.
    """
    if graph_stages(model):
        raise BadValue(f"{source} is dynamic already; there is nothing to convert")
    model.eval()
    cfg = model.pretrained_cfg
    try_register(f"dg_{cfg['architecture']}")
    static = complexity(model)
    images = torch.randn(2, *cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
    origin = None if Path(source.removeprefix("local-dir:")).exists() else cfg.get("hf_hub_id")
    dynamize(model)
    with torch.inference_mode():
        same = torch.equal(model(images), expected)
    if not same:
        raise BadState(f"the dynamic network of {source} predicts something else; nothing was written")
    made = {"Weights": f"those of {Path(source).name}, converted by `dg-timm convert`; nothing was trained since"}
    save_pretrained(
        model, folder, card=Card(made=made, base_model=origin, license=cfg.get("license") if origin else None)
    )
    dynamic = complexity(model)
    return {
        "model": source,
        "folder": str(folder),
        "stages": {name: len(stage.block_names) for name, stage in graph_stages(model).items()},
        "classes": model.num_classes,
        "params": [static.params, dynamic.params],
        "multiply_adds": [static.multiply_adds, dynamic.multiply_adds],
        "identical": same,
    }


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Convert; return the exit status."""
    args = parse(argv)
    held = managed_files(args.output)
    if held:
        raise BadState(f"{args.output} holds {', '.join(held)} already; give another --output")
    done = convert_network(load_static(args.source, args.arch, args.random), args.source, args.output)
    if args.json:
        print(json.dumps(done))
        return 0
    stages = ", ".join(f"{name} ({blocks} blocks)" for name, blocks in done["stages"].items())
    (before, after), (macs, most) = ([n / 1e6 for n in done[key]] for key in ("params", "multiply_adds"))
    print(
        f"{args.source}: {len(done['stages'])} graphs: {stages}\n"
        f"parameters {before:.2f} M -> {after:.2f} M; multiply-adds {macs:.1f} M -> {most:.1f} M with every edge open\n"
        f"predicts the same, bit for bit; it saves nothing until it has learned to close\nsaved: {args.output}"
    )
    return 0
