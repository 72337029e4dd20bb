"""Publish a network on the Hugging Face Hub: safetensors, config.json, the card, the picture of its wiring.

    python train_scripts/publish.py output/train/model your-name/my-network --dry-run
    python train_scripts/publish.py output/train/model your-name/my-network --images path/to/pictures --private
    python train_scripts/publish.py dg_resnet50.a1_in1k your-name/dg_resnet50.a1_in1k

The source is a folder that train.py or save_pretrained wrote (or a run's folder), or a model of the zoo: timm's
weights, converted, with the card that hub_cards/ has for it, or those that ship with the package. Nothing but the files
listed is sent, in one commit, and none where the repository holds the same already. The token is that of
`hf auth login` or HF_TOKEN; it is never printed or stored.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import Tensor

import dg_timm
from dg_timm.hub.push import planned_files, push_folder
from dg_timm.hub.save import README, draw

CARDS = Path(__file__).parents[2] / "hub_cards"
PICTURES = 4  # drawn on the card


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="FOLDER_OR_MODEL")
    parser.add_argument("repo_id", metavar="OWNER/NAME")
    parser.add_argument("--images", type=Path, help="folder of pictures; the wiring of the first few goes on the card")
    parser.add_argument("--card", type=Path, help="source of a zoo model's card; by default the one in hub_cards/")
    parser.add_argument("--max-shard-size", default="5GB", help="of a zoo model's weights, for example 500MB")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--revision", help="branch, made if missing; by default main")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--commit-message")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="publish-") as scratch:
            folder = prepare(args, Path(scratch) / "model")
            show(planned_files(folder, args.repo_id), args.repo_id, with_card=args.dry_run)
            if args.dry_run:
                print("\nnothing was sent (--dry-run)")
                return 0
            done = push_folder(
                folder,
                args.repo_id,
                private=args.private or None,
                revision=args.revision,
                create_pr=args.create_pr,
                commit_message=args.commit_message,
            )
    except (ValueError, RuntimeError, OSError, ImportError, HfHubHTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if done.changed:
        print(f"published: {done.url}")
    else:
        print(f"nothing changed: {done.repo_id} holds this content already, as commit {done.commit}")
    return 0


def prepare(args: argparse.Namespace, scratch: Path) -> Path:
    """The folder to publish: the user's own, a copy of it with the picture, or one made for a model of the zoo."""
    source = Path(args.source)
    if source.is_dir():
        folder = source / "model" if not (source / README).exists() and (source / "model").is_dir() else source
        if args.card is not None:
            raise ValueError(f"--card is for models of the zoo; {folder} has its card, {README}: edit that one")
        if args.images is None:
            return folder
        scratch.mkdir()
        for name in planned_files(folder, args.repo_id):
            shutil.copy(folder / name, scratch)
        trained = timm.create_model(f"local-dir:{scratch}", pretrained=True)
        draw(trained, read_images(args.images, trained), scratch)
        return scratch
    if not args.source.startswith("dg_") or not timm.is_model(args.source.partition(".")[0]):
        raise ValueError(f"{args.source} is neither a folder nor a model of the zoo (timm.list_models('dg_*'))")
    if args.source in dg_timm.models.registry.TRAINED:
        return dg_timm.models.registry.TRAINED[args.source]
    if args.images is not None:
        raise ValueError("--images: a converted network has the same wiring for every image; leave it out")
    tag = timm.get_pretrained_cfg_value(args.source, "tag")
    name = args.source if "." in args.source else f"{args.source}.{tag}"
    card = dg_timm.Card.read(args.card or find_card(name), name)
    model: Any = timm.create_model(name, pretrained=True)
    return dg_timm.save_pretrained(
        model,
        scratch,
        card=card,
        images=torch.zeros(1, *model.pretrained_cfg["input_size"]) if card.converted else None,
        max_shard_size=args.max_shard_size,
    )


def find_card(name: str) -> Path:
    for file in sorted(CARDS.glob("*.yaml")):
        if f"- {name}\n" in file.read_text():
            return file
    raise ValueError(f"hub_cards/ has no card for {name}; add it to the `models` of one, or give --card")


def read_images(folder: Path, model: Any) -> Tensor:
    files = sorted(p for p in folder.glob("**/*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise ValueError(f"--images {folder} holds no picture (jpg, png, webp)")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files[:PICTURES]])


def show(files: dict[str, str | bytes], repo_id: str, with_card: bool) -> None:
    print(f"{repo_id}:")
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else Path(content).stat().st_size
        print(f"  {size:>12,} bytes  {name}")
    if with_card:
        card = files[README]
        assert isinstance(card, bytes)
        print(f"\n{card.decode()}")
