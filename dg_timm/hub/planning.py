"""Plan a publication: the files of a folder that are sent, once they are known to be complete and to fit together."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from timm.models import is_model

from dg_timm._errors import BadValue, UserError
from dg_timm.conversion.state_dict import check_fit
from dg_timm.hub.config import build_on_meta
from dg_timm.hub.layout import CONFIG, INDEX, README, WEIGHT_FILES, WEIGHTS, WIRING_PNG, managed_files, shards_of
from dg_timm.hub.rendering import with_repo_id

Folder = Union[str, "os.PathLike[str]"]


def planned_files(folder: Folder, repo_id: str) -> dict[str, Union[str, bytes]]:
    """List what a publication of a folder sends.

    Returns:
        {name in the repository: path of the file, or its content where that differs from the file's}.

    Raises:
        BadValue: if a file is missing or damaged, or is not of a network that dg_timm can load.
    """
    folder = Path(folder)
    names = managed_files(folder)
    missing = [name for name in (CONFIG, README) if name not in names]
    if missing or not any(WEIGHT_FILES.fullmatch(name) for name in names):
        missing = missing or [WEIGHTS]
        _check_kind(folder, names)
        raise BadValue(f"{folder} has no {' and no '.join(missing)}; give a folder that save_pretrained wrote")
    try:
        text = with_repo_id((folder / README).read_text(encoding="utf-8"), repo_id)
        metadata = ModelCard(text).data.to_dict()
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise BadValue(f"{folder / README} has no valid front matter: {error}") from error
    if not metadata:
        raise BadValue(f"{folder / README} has no front matter (license, tags, ... between --- lines)")
    if f"]({WIRING_PNG})" not in text:
        names = [name for name in names if name != WIRING_PNG]  # it is not of this card
    _check_weights(folder, names, read_config(folder / CONFIG))
    return {name: text.encode() if name == README else str(folder / name) for name in names}


def _check_kind(folder: Path, names: Sequence[str]) -> None:
    """Say so if a folder without a card holds a network that has none."""
    if CONFIG not in names:
        return
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        return
    if isinstance(config, dict) and "detector" in config:
        raise BadValue(f"{folder} holds a detector; detectors are not published")
    architecture = str(config.get("architecture", "")) if isinstance(config, dict) else ""
    if architecture and not architecture.startswith("dg_"):
        raise BadValue(
            f"{folder} holds a static network ({architecture}), which is not published here; dg-timm convert makes it "
            "dynamic, and timm.models.push_to_hf_hub publishes it as it is"
        )


def read_config(file: Path) -> dict[str, Any]:
    """Read the config.json of a network whose name timm knows; BadValue otherwise."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadValue(f"{file} is not valid JSON: {error}") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not (isinstance(architecture, str) and architecture.startswith("dg_") and is_model(architecture)):
        raise BadValue(
            f"{file} names the architecture {architecture!r}, which timm does not know; for a network outside the zoo "
            "call dg_timm.models.register(...) first"
        )
    assert isinstance(config, dict)
    return config


def _check_weights(folder: Path, names: Sequence[str], config: Mapping[str, Any]) -> None:
    wanted = [WEIGHTS]
    if INDEX in names:
        if WEIGHTS in names:
            raise BadValue(f"{folder} holds both {WEIGHTS} and shards; delete what is not of this network")
        wanted = shards_of(folder / INDEX)
    found = [name for name in names if name.endswith(".safetensors")]
    if found != wanted:
        raise BadValue(f"{folder} should hold the weights {', '.join(wanted)}, and holds {', '.join(found)}")
    tensors: dict[str, Any] = {}
    for name in found:
        try:
            with safe_open(folder / name, "pt") as file:
                tensors |= {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        except SafetensorError as error:
            raise BadValue(f"{folder / name} is damaged: {error}") from error
    try:
        check_fit(build_on_meta(config), tensors)
    except (UserError, RuntimeError, TypeError, KeyError) as error:  # what timm makes of a wrong configuration
        raise BadValue(f"{folder / CONFIG} does not describe the network in {', '.join(found)}: {error}") from error
