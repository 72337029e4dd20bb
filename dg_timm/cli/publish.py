"""Publish a network on the Hugging Face Hub: safetensors, config.json, the card, the picture of its wiring.

    dg-timm publish output/train/model your-name/my-network --dry-run
    dg-timm publish output/train/model your-name/my-network --images path/to/pictures --private
    dg-timm publish dg_resnet50.a1_in1k your-name/dg_resnet50.a1_in1k

The source is a folder that train.py or save_pretrained wrote (or a run's folder), or a model of the zoo: timm's
weights, converted, with the card that hub_cards/ has for it, or a network that ships with the package. Only the files
listed are sent, in one commit, and none where the repository holds the same already. The token is that of
`hf auth login` or HF_TOKEN; it is never printed or stored.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor

import dg_timm
from dg_timm._command_line import CommandParser
from dg_timm._errors import BadValue
from dg_timm._files import atomic_path
from dg_timm.cli.errors import cli_errors
from dg_timm.hub.layout import CONFIG, README
from dg_timm.hub.planning import planned_files
from dg_timm.hub.push import check_repo_id, push_folder
from dg_timm.hub.save import attach_wiring_picture
from dg_timm.models.registry import BUNDLED, STATIC_MODELS, try_register
from dg_timm.training.data.decoding import decode_image, describe

CARDS = Path(__file__).parents[2] / "hub_cards"  # of the repository; an installed package has none
PICTURES = 4  # drawn on the card


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__)
    parser.add_argument("source", metavar="FOLDER_OR_MODEL", help="a saved network, or a name of the zoo with its tag")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the repository to publish to; it is made if missing")
    parser.add_argument(
        "--images", type=Path, help=f"a folder of pictures; the card shows the wiring of the first {PICTURES} "
        "(default: the card's own picture)"
    )  # fmt: skip
    parser.add_argument(
        "--card", type=Path, help="the source of a zoo model's card (default: the file in hub_cards/ that names it)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB",
        help="the largest weights file of a zoo model, in bytes or for example 500MB (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--private", action="store_true", help="make a private repository (default: a public one)")
    parser.add_argument("--revision", help="the branch to commit to; it is made if missing (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request (default: commit directly)")
    parser.add_argument("--commit-message", help="the commit's message (default: the network's name and our version)")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be sent, and send nothing (default: send)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="a new folder for a copy of what is sent, to look at (default: none)",
    )
    parser.add_argument("--json", action="store_true", help="print what was sent as a line of JSON (default: as text)")
    return parser


@cli_errors
def main(argv: Optional[list[str]] = None) -> int:
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="publish-") as scratch:
        return publish_source(args, Path(scratch) / "model")


def publish_source(args: argparse.Namespace, scratch: Path) -> int:
    """Show what would be sent and, unless ``--dry-run`` is given, send it; return the exit status."""
    check_repo_id(args.repo_id)
    if args.output is not None and args.output.exists():
        raise BadValue(f"--output {args.output} exists already; give a new folder")
    folder = prepare(args, scratch)
    files = planned_files(folder, args.repo_id)
    if args.output is not None:
        keep(files, args.output)
    row = {"repo_id": args.repo_id, "files": {name: size_of(content) for name, content in files.items()}}
    if not args.json:
        show(files, args.repo_id, with_card=args.dry_run)
    if args.dry_run:
        print(json.dumps({**row, "sent": False}) if args.json else "\nnothing was sent (--dry-run)")
        return 0
    done = push_folder(
        folder,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
    )
    if args.json:
        print(json.dumps({**row, "sent": done.changed, "commit": done.commit, "url": done.url}))
    elif done.changed:
        print(f"published: {done.url}")
    else:
        print(f"nothing changed: {done.repo_id} holds this content already, as commit {done.commit}")
    return 0


def prepare(args: argparse.Namespace, scratch: Path) -> Path:
    """Return the folder to publish: the user's own, a copy of it with the picture, or one made of a zoo model."""
    source = Path(args.source)
    if source.is_dir():
        folder = source / "model" if not (source / README).exists() and (source / "model").is_dir() else source
        return prepare_folder(folder, args, scratch)
    if args.source.partition(".")[0].removeprefix("dg_") not in STATIC_MODELS or not args.source.startswith("dg_"):
        raise BadValue(f"{args.source} is neither a folder nor a model of the zoo (timm.list_models('dg_*'))")
    if args.source in BUNDLED:
        return BUNDLED[args.source]
    if args.images is not None:
        raise BadValue("--images: a converted network has the same wiring for every image; leave it out")
    return convert_published(name_with_tag(args.source), args, scratch)


def prepare_folder(folder: Path, args: argparse.Namespace, scratch: Path) -> Path:
    if args.card is not None:
        raise BadValue(f"--card is for models of the zoo; {folder} has its card, {README}: edit that one")
    make_name_known(folder)
    if args.images is None:
        return folder
    scratch.mkdir()
    for name in planned_files(folder, args.repo_id):
        shutil.copy(folder / name, scratch)
    model = timm.create_model(f"local-dir:{scratch}", pretrained=True)
    attach_wiring_picture(model, read_images(args.images, model), scratch)
    return scratch


def make_name_known(folder: Path) -> None:
    """Register the network's name where the zoo does not list it; what is wrong with a folder is said later."""
    try:
        architecture = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    try_register(architecture)


def convert_published(name: str, args: argparse.Namespace, scratch: Path) -> Path:
    """Load timm's weights into a model of the zoo, and save it with its card."""
    card = dg_timm.Card.read(args.card or find_card(name), name)
    model: Any = timm.create_model(name, pretrained=True)
    images = torch.zeros(1, *model.pretrained_cfg["input_size"]) if card.converted else None
    return dg_timm.save_pretrained(model, scratch, card=card, images=images, max_shard_size=args.max_shard_size)


def name_with_tag(name: str) -> str:
    """Complete a name of the zoo by its default tag."""
    known = [key for key, cfg in get_arch_pretrained_cfgs(name.partition(".")[0]).items() if cfg.has_weights]
    if "." not in name:
        name = f"{name}.{timm.get_pretrained_cfg_value(name, 'tag')}"
    if name not in known:
        raise BadValue(f"{name} has no weights; there are {', '.join(known) or 'none of this model'}")
    return name


def find_card(name: str) -> Path:
    """Find the source in hub_cards/ that has the card of a model."""
    if not CARDS.is_dir():
        raise BadValue(
            f"the cards of the zoo lie in hub_cards/ of dg_timm's repository, and {CARDS} does not exist: run this "
            "in a clone of the repository, or give --card"
        )
    for file in sorted(CARDS.glob("*.yaml")):
        if f"- {name}\n" in file.read_text(encoding="utf-8"):
            return file
    raise BadValue(f"hub_cards/ has no card for {name}; add it to the `models` of one, or give --card")


def read_images(folder: Path, model: Any) -> Tensor:
    """Read the first few pictures of a folder as the model takes them: (batch, channels, height, width)."""
    files = sorted(p for p in folder.glob("**/*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise BadValue(f"--images {folder} holds no picture (jpg, png, webp)")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images = []
    for file in files[:PICTURES]:
        try:
            images.append(transform(decode_image(str(file), "RGB")))
        except Exception as error:  # decoders raise anything
            raise BadValue(f"--images: can't read {file}: {describe(error)}") from error
    return torch.stack(images)


def keep(files: Mapping[str, str | bytes], folder: Path) -> None:
    """Write what is sent into a new folder."""
    with atomic_path(folder) as temporary:
        for name, content in files.items():
            place = temporary / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())


def size_of(content: str | bytes) -> int:
    """The bytes of a file, given as they are or by its path."""
    return len(content) if isinstance(content, bytes) else Path(content).stat().st_size


def show(files: Mapping[str, str | bytes], repo_id: str, with_card: bool) -> None:
    """Print the files with their sizes and, if wanted, the card."""
    print(f"{repo_id}:")
    for name, content in files.items():
        print(f"  {size_of(content):>12,} bytes  {name}")
    if with_card:
        card = files[README]
        assert isinstance(card, bytes)
        print(f"\n{card.decode()}")
