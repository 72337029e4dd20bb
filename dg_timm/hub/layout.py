"""Files of a network in Hub layout: their names, and which of a folder's files are managed here."""

import json
import re
from pathlib import Path

from dg_timm._errors import BadValue

CONFIG = "config.json"
README = "README.md"  # the card
WIRING_PNG = "wiring.png"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# Everything that save_pretrained may write. No other file of a folder is ever replaced, deleted or published.
_MANAGED_FILES = re.compile(rf"{WEIGHT_FILES.pattern}|{re.escape(CONFIG)}|{re.escape(README)}|{re.escape(WIRING_PNG)}")


def managed_files(folder: Path) -> list[str]:
    """List the files in a folder that save_pretrained may have written, by name."""
    return sorted(path.name for path in folder.glob("*") if path.is_file() and _MANAGED_FILES.fullmatch(path.name))


def shards_of(index: Path) -> list[str]:
    """List the weight files that an index names.

    Raises:
        BadValue: if the file is not an index, or names anything but safetensors files beside it.
    """
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadValue(f"{index} is not a valid index of shards: {error!r}") from error
    outside = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if outside:
        raise BadValue(f"{index} names {outside[0]!r}: a shard must be a .safetensors file beside its index")
    return names
