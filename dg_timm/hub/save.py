"""Save a dynamic graph network in Hub layout.

What is written here, ``timm.create_model("local-dir:...")`` and ``("hf-hub:...")`` read back, and transformers too.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from torch import Tensor, nn

from dg_timm._errors import BadState, BadType, BadValue, UserError
from dg_timm._files import atomic_write, folder_for, put_in_place
from dg_timm.analysis.plot import draw_wiring
from dg_timm.analysis.recorder import adjacency
from dg_timm.conversion.state_dict import check_fit, is_identity
from dg_timm.graph.stage import routers
from dg_timm.hub.card import Card
from dg_timm.hub.config import build_on_meta, name_and_options, write_config
from dg_timm.hub.layout import CONFIG, README, WEIGHT_FILES, WIRING_PNG, managed_files
from dg_timm.hub.provenance import provenance_of
from dg_timm.hub.rendering import render_card, with_picture

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

    The files are renamed into the folder when all of them are complete. Files that have other names are left alone.

    Args:
        model: a dynamic graph network of the zoo, or one that ``dynamize`` made of a model whose ``dg_`` name timm
            knows (:func:`dg_timm.models.register` makes one known).
        folder: where the files go; it is made if missing.
        label_names: one name for each class, in the order of the logits; by default those it was loaded with.
        data_config: preprocessing of the trained network (``input_size``, ``mean``, ``std``, ``interpolation``,
            ``crop_pct``); by default the model's own.
        card: what the model itself does not know: how it was made, what was measured.
        images: (batch, channels, height, width), preprocessed; their wiring is drawn (needs ``dg-timm[plots]``).
        max_shard_size: bytes, or for example "500MB"; larger weights are split into several files with an index.
        overwrite: replace the files of an earlier save.

    Raises:
        BadValue: if the model is static, timm knows no name to load it back by, the labels do not fit, or the card says
            that the weights are converted while the graph is not the identity.
        BadType: if the labels are not a list of strings.
        BadState: if the folder holds one of the files and ``overwrite`` is False.
        MissingPackage: if ``images`` are to be drawn without ``dg-timm[plots]``.

    >>> import dg_timm, timm
    >>> model = timm.create_model("dg_cifar_resnet20", num_classes=2)
    >>> folder = dg_timm.save_pretrained(model, "my-network", label_names=["cat", "dog"])
    >>> loaded = timm.create_model("local-dir:my-network", pretrained=True)
    >>> loaded.pretrained_cfg["label_names"]
    ['cat', 'dog']
    """
    card = card or Card()
    _check_savable(model, card, label_names, max_shard_size)
    folder = Path(folder)
    existing = managed_files(folder)
    if existing and not overwrite:
        raise BadState(f"{folder} holds {', '.join(existing)} already; pass overwrite=True or another folder")

    with folder_for(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        fresh = Path(scratch)
        save_torch_state_dict(model.state_dict(), fresh, max_shard_size=max_shard_size)
        config = write_config(model, fresh / CONFIG, label_names=label_names, data_config=data_config)
        _check_loads_back(model, config)
        render_card(model, config, _with_base_model(card, model)).save(fresh / README)
        if images is not None:
            attach_wiring_picture(model, images, fresh, card.converted)
        written = _move(fresh, folder)
    _delete_weights(folder, set(existing) - set(written))
    return folder


def _check_loads_back(model: nn.Module, config: Mapping[str, Any]) -> None:
    try:
        check_fit(build_on_meta(config), model.state_dict())
    except (UserError, RuntimeError) as error:
        raise BadValue(f"timm could not load this model back, and nothing was saved: {error}") from error


def _delete_weights(folder: Path, names: set[str]) -> None:
    """Delete weights of an earlier save; timm would read them in place of the new ones."""
    for name in names:
        if WEIGHT_FILES.fullmatch(name):
            (folder / name).unlink()


def _move(fresh: Path, folder: Path) -> list[str]:
    """Rename the files of one folder into another one on the same disk; return their names."""
    mode = (fresh / CONFIG).stat().st_mode
    names = managed_files(fresh)
    for name in names:
        (fresh / name).chmod(mode)  # safetensors makes files that only their owner can read
        put_in_place(fresh / name, folder / name)
    return names


def _check_savable(
    model: nn.Module, card: Card, label_names: Optional[Sequence[str]], max_shard_size: Union[int, str]
) -> None:
    _check_model(model)
    _check_labels(label_names, model)
    _check_shard_size(model, max_shard_size)
    _check_converted(model, card)


def _check_model(model: nn.Module) -> None:
    for wrapped in ("_orig_mod", "module"):  # of torch.compile; of DataParallel and the average of weights
        if isinstance(getattr(model, wrapped, None), nn.Module):
            raise BadValue(f"{type(model).__name__} wraps the network; save what is inside: model.{wrapped}")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise BadState("a model on the meta device has no weights to save; load them first")
    name_and_options(model)
    num_classes = getattr(model, "num_classes", None)
    if not num_classes:
        what = "has no classifier (model.reset_classifier(n))" if num_classes == 0 else "is a feature extractor"
        raise BadValue(f"this {type(model).__name__} {what}; save the whole model")
    if any(router.fixed_threshold is not None for router in routers(model).values()):
        raise BadValue(
            "set_threshold is in force and is not saved: the saved network would run with its learned thresholds. "
            "Call set_threshold(model, None) first"
        )


def _check_labels(label_names: Optional[Sequence[str]], model: nn.Module) -> None:
    if label_names is None:
        return
    if isinstance(label_names, str) or not isinstance(label_names, Sequence):
        raise BadType(f"label_names must be a list of names, got {type(label_names).__name__}")
    for name in label_names:
        if not isinstance(name, str):
            raise BadType(f"label_names must be strings, got {name!r}")
    if len(label_names) != model.num_classes:
        raise BadValue(
            f"{len(label_names)} label_names for a model of {model.num_classes} classes; give one for each class"
        )


def _check_shard_size(model: nn.Module, max_shard_size: Union[int, str]) -> None:
    wanted = f'max_shard_size must be bytes or for example "500MB", got {max_shard_size!r}'
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise BadValue(f"{wanted}: it must be positive")
    try:
        split_torch_state_dict_into_shards(model.state_dict(), max_shard_size=max_shard_size)
    except (ValueError, TypeError) as error:
        raise BadValue(f"{wanted}: {error}") from error


def _check_converted(model: nn.Module, card: Card) -> None:
    if card.converted and not is_identity(model):
        raise BadValue(
            "the card says that these weights are converted, but the graph is not the identity any more: an edge's "
            "weight, a threshold or the topology is another one than that of the conversion. Save it with "
            "converted=False, or convert the static weights anew"
        )


def _with_base_model(card: Card, model: nn.Module) -> Card:
    """Name the repository that the weights were loaded from. Those of a file or a bare network have none."""
    if card.base_model is not None:
        return card
    provenance = provenance_of(model)
    source = None if provenance is None else provenance.repo_id
    if source is None and card.converted:
        source = getattr(model, "pretrained_cfg", {}).get("hf_hub_id")
        if source is None:
            raise BadValue("the card says that these weights are converted; name their repository (base_model)")
    return dataclasses.replace(card, base_model=source.partition("@")[0] if source else None)


def attach_wiring_picture(model: nn.Module, images: Tensor, folder: Path, converted: bool = False) -> None:
    """Draw the wiring of images into a saved folder, and show the picture on the card there.

    Args:
        model: a dynamic graph network.
        images: (batch, channels, height, width), preprocessed.
        folder: holds the card.
        converted: whether the network is an identity conversion: its wiring is drawn once, without the images.
    """
    draw_wiring(adjacency(model, images), folder / WIRING_PNG, images=None if converted else images)
    card = folder / README
    atomic_write(card, with_picture(card.read_text(encoding="utf-8"), converted))
