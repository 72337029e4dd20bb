"""Save a dynamic graph network in Hub layout.

What is written here, ``timm.create_model("local-dir:...")`` and ``("hf-hub:...")`` read back, and transformers too.
"""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import timm
from huggingface_hub import (
    save_torch_state_dict,
    split_torch_state_dict_into_shards,
)
from timm.models import is_model
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from dg_timm._version import __version__
from dg_timm.analysis.plot import draw_wiring
from dg_timm.analysis.recorder import adjacency
from dg_timm.conversion.state_dict import check_fit, is_identity
from dg_timm.graph.stage import SWITCHES, graph_stages, require_dynamic, routers
from dg_timm.hub.card import PICTURE, Card, render, with_picture

CONFIG, README = "config.json", "README.md"
# everything that save_pretrained may write; nothing else of a folder is ever replaced, or published
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_OURS = re.compile(rf"{WEIGHT_FILES.pattern}|{re.escape(CONFIG)}|{re.escape(README)}|{re.escape(PICTURE)}")

Folder = Union[str, "os.PathLike[str]"]


def save_pretrained(
    model: nn.Module,
    folder: Folder,
    *,
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Mapping[str, Any]] = None,
    card: Optional[Card] = None,
    images: Optional[Tensor] = None,
    max_shard_size: Union[int, str] = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write model.safetensors, config.json, README.md (the card) and, for some images, wiring.png.

    Args:
        model: a dynamic graph network of the zoo, or one that ``dynamize`` made of a model with a ``dg_`` twin there.
        folder: made if missing. Every file is written beside its place and renamed; other files are left alone.
        label_names: one for each class, in the order of the logits; by default those of the model's configuration.
        data_config: preprocessing of the trained network (``input_size``, ``mean``, ``std``, ``interpolation``,
            ``crop_pct``); by default the model's own.
        card: what the model itself does not know: how it was made, what was measured.
        images: (batch, channels, height, width), preprocessed, whose wiring is drawn (needs ``dg-timm[plots]``).
        max_shard_size: bytes, or for example "500MB"; larger weights are split into several files with an index.
        overwrite: replace files of an earlier save.

    Raises:
        ValueError: if the model is static, has no name that timm could load it back by, or the labels don't fit.
        FileExistsError: if the folder holds one of the files and ``overwrite`` is False.
    """
    _check_savable(model, label_names, max_shard_size, card)
    folder = Path(folder)
    existing = files_in(folder)
    if existing and not overwrite:
        raise FileExistsError(f"{folder} holds {', '.join(existing)} already; pass overwrite=True or another folder")

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        beside = Path(scratch)
        save_torch_state_dict(model.state_dict(), beside, max_shard_size=max_shard_size)
        config = write_config(model, beside / CONFIG, label_names=label_names, data_config=data_config)
        try:
            check_fit(built_from(config), model.state_dict())
        except RuntimeError as error:
            raise ValueError(f"timm could not load this model back, and nothing was saved: {error}") from error
        known = _with_base_model(card or Card(), model)
        render(model, config, known).save(beside / README)
        if images is not None:
            draw(model, images, beside, known.converted)
        mode = (beside / CONFIG).stat().st_mode
        written = files_in(beside)
        for name in written:
            (beside / name).chmod(mode)  # safetensors makes its files private
            os.replace(beside / name, folder / name)
    for name in set(existing) - set(written):
        if WEIGHT_FILES.fullmatch(name):  # of an earlier save, which would be taken for this one
            (folder / name).unlink()
    return folder


def _check_savable(
    model: nn.Module, label_names: Optional[Sequence[str]], max_shard_size: Union[int, str], card: Optional[Card]
) -> None:
    for wrapped in ("_orig_mod", "module"):  # of torch.compile; of DataParallel and the average of weights
        if isinstance(getattr(model, wrapped, None), nn.Module):
            raise ValueError(f"{type(model).__name__} wraps the network; save what is inside: model.{wrapped}")
    _name_and_options(model)  # raises where timm could not load the folder back
    num_classes = getattr(model, "num_classes", None)
    if not num_classes:
        what = "has no classifier (model.reset_classifier(n))" if num_classes == 0 else "is a feature extractor"
        raise ValueError(f"this {type(model).__name__} {what}; save the whole model")
    if label_names is not None:
        if isinstance(label_names, str) or not isinstance(label_names, Sequence):
            raise TypeError(f"label_names must be a list of names, got {type(label_names).__name__}")
        for name in label_names:
            if not isinstance(name, str):
                raise TypeError(f"label_names must be strings, got {name!r}")
        if len(label_names) != num_classes:
            raise ValueError(
                f"{len(label_names)} label_names for a model of {num_classes} classes; give one for each class"
            )
    if any(router.fixed_threshold is not None for router in routers(model).values()):
        raise ValueError(
            "set_threshold is in force and is not saved: the saved network would run with its learned thresholds. "
            "set_threshold(model, None) first"
        )
    if card is not None and card.converted and not is_identity(model):
        raise ValueError("the card says that these weights are converted, but the graph is not the identity any more")
    try:
        if isinstance(max_shard_size, int) and max_shard_size < 1:
            raise ValueError("it must be positive")
        split_torch_state_dict_into_shards(model.state_dict(), max_shard_size=max_shard_size)
    except (ValueError, TypeError) as error:
        raise ValueError(f'max_shard_size is bytes or for example "500MB", got {max_shard_size!r}: {error}') from error


def built_from(config: Mapping[str, Any]) -> nn.Module:
    """The network that a config.json describes, on the meta device: names and shapes only."""
    options = {"in_chans": config["pretrained_cfg"]["input_size"][0], "num_classes": config["num_classes"]}
    return timm.create_model(config["architecture"], device="meta", **{**config.get("model_args", {}), **options})


def _with_base_model(card: Card, model: nn.Module) -> Card:
    """Name the repository that the weights were loaded from; a file or a bare network has none that is known."""
    if card.base_model is not None:
        return card
    source = getattr(model, "weights_from", None)
    if source is None and card.converted:
        source = getattr(model, "pretrained_cfg", {}).get("hf_hub_id")
        if source is None:
            raise ValueError("the card says that these weights are converted; name their repository (base_model)")
    return dataclasses.replace(card, base_model=source.partition("@")[0] if source else None)


def draw(model: nn.Module, images: Tensor, folder: Path, converted: bool = False) -> None:
    """Draw the wiring of images beside the card in a folder, and show it there."""
    draw_wiring(adjacency(model, images), folder / PICTURE, images=None if converted else images)
    card = folder / README
    card.write_text(with_picture(card.read_text(), converted))


def write_config(
    model: nn.Module,
    file: Path,
    *,
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Mapping[str, Any]] = None,
) -> dict[str, Any]:
    """Write config.json of a model, dynamic or static, as timm and transformers read it; its content is returned."""
    dynamic = bool(graph_stages(model))
    architecture, model_args = _name_and_options(model) if dynamic else (None, {})
    if label_names is None:  # of the configuration that it was loaded with, while the classes are still those
        known = getattr(model, "pretrained_cfg", {}).get("label_names")
        kept = isinstance(known, (list, tuple)) and len(known) == getattr(model, "num_classes", None)
        label_names = known if kept else None
    save_config_for_hf(
        model,
        str(file),
        model_config={"label_names": list(label_names) if label_names else None, "dg_timm": {"version": __version__}},
        model_args=model_args,
        data_config=dict(data_config or {}),
    )
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config["architecture"] = architecture or config["architecture"]
    config["pretrained_cfg"].pop("label_names", None)  # they are at the root
    if getattr(model, "from_scratch", dynamic):  # of weights that timm did not load for us, nothing is known
        for key in ("tag", "license", "origin_url", "paper_name", "paper_ids", "description", "notes"):
            config["pretrained_cfg"].pop(key, None)
    # transformers passes num_classes itself and fails on a second one; timm reads it at the root
    config.get("model_args", {}).pop("num_classes", None)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def _name_and_options(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The zoo name that builds this model again, and the graph options to build it with."""
    stages = require_dynamic(model)
    stage = next(iter(stages.values()))
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture") or ""
    if not architecture.startswith("dg_"):
        architecture = f"dg_{architecture}"
    if not is_model(architecture):
        raise ValueError(
            f"{type(model).__name__} can't be saved: the zoo has no {architecture!r} that timm could load it back by; "
            'see timm.list_models("dg_*"), or keep its state_dict()'
        )
    options: dict[str, Any] = {key: False for key in SWITCHES if not getattr(stage, key)}
    if not all(stage.is_complete() for stage in stages.values()):
        options["topology"] = {name: stage.edges for name, stage in stages.items()}
    return architecture, options


def files_in(folder: Path) -> list[str]:
    """Names of the files in a folder that save_pretrained may have written."""
    return sorted(path.name for path in folder.glob("*") if path.is_file() and _OURS.fullmatch(path.name))
