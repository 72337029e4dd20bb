"""Print the model card of a network, or write it to a file.

    dg-timm card output/train/model
    dg-timm card output/train/model --repo-id your-name/my-network --output README.md
    dg-timm card dg_cifar_resnet26.cifar10

A saved network has its card, README.md, which may have been edited. Of another network the card says what the network
itself tells: graph, parameters, multiply-adds, usage.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dg_timm._command_line import CommandParser
from dg_timm._errors import BadValue
from dg_timm._files import atomic_write
from dg_timm.cli.errors import cli_errors
from dg_timm.cli.loading import load_network
from dg_timm.graph.stage import graph_stages
from dg_timm.hub.layout import README
from dg_timm.hub.push import check_repo_id
from dg_timm.hub.rendering import with_repo_id
from dg_timm.hub.save import save_pretrained
from dg_timm.models.registry import BUNDLED


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="network: a folder, a run's folder, a dg_* name, or hf-hub:...")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="write it for this repository; by default for a folder")
    parser.add_argument("--output", type=Path, help="file to write; by default the card is printed")
    return parser.parse_args(argv)


def card_of(name: str) -> str:
    """Read the card that a network has, or render one.

    Raises:
        BadValue: for a network that is unknown or static.
    """
    folder = BUNDLED.get(name, Path(name.removeprefix("local-dir:")))
    for place in (folder / README, folder / "model" / README):
        if place.is_file():
            return place.read_text(encoding="utf-8")
    model, _ = load_network(name)
    if not graph_stages(model):
        raise BadValue(f"{name} is static: dg_timm writes cards of dynamic networks; dg-timm convert makes it one")
    with tempfile.TemporaryDirectory(prefix="card-") as scratch:
        return (save_pretrained(model, Path(scratch) / "model") / README).read_text(encoding="utf-8")


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the card; return the exit status."""
    args = parse(argv)
    if args.repo_id:
        check_repo_id(args.repo_id)
    text = card_of(args.model)
    if args.repo_id:
        text = with_repo_id(text, args.repo_id)
    if args.output:
        atomic_write(args.output, text)
        print(f"card: {args.output}")
    else:
        print(text)
    return 0
