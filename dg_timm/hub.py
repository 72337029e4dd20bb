"""Save a dynamic graph network in Hub layout, publish it, and know what of a folder is published.

What is written here, ``timm.create_model("local-dir:...")`` and ``("hf-hub:...")`` read back, and transformers too.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    save_torch_state_dict,
    split_torch_state_dict_into_shards,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from timm.models import is_model
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from dg_timm.card import PICTURE, Card, render, with_address, with_picture
from dg_timm.checkpoint import graph_stages
from dg_timm.introspect import adjacency, require_dynamic
from dg_timm.version import __version__
from dg_timm.wiring import draw_wiring

CONFIG, README = "config.json", "README.md"
# everything that save_pretrained may write; nothing else of a folder is ever replaced or published
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_OURS = re.compile(rf"{_WEIGHTS.pattern}|{re.escape(CONFIG)}|{re.escape(README)}|{re.escape(PICTURE)}")

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
    _name_and_options(model)  # raises where timm could not load the folder back
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        raise ValueError(f"{type(model).__name__} is a feature extractor; save the whole model (features_only=False)")
    if label_names is not None and len(label_names) != num_classes:
        raise ValueError(
            f"{len(label_names)} label_names for a model of {num_classes} classes; give one for each class"
        )
    split_torch_state_dict_into_shards(
        model.state_dict(), max_shard_size=max_shard_size
    )  # raises for a size that is none
    folder = Path(folder)
    existing = _files_in(folder)
    if existing and not overwrite:
        raise FileExistsError(f"{folder} holds {', '.join(existing)} already; pass overwrite=True or another folder")

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        beside = Path(scratch)
        save_torch_state_dict(model.state_dict(), beside, max_shard_size=max_shard_size)
        config = write_config(model, beside / CONFIG, label_names=label_names, data_config=data_config)
        known = _with_base_model(card or Card(), model)
        render(model, config, known).save(beside / README)
        if images is not None:
            draw(model, images, beside, known.converted)
        mode = (beside / CONFIG).stat().st_mode
        written = _files_in(beside)
        for name in written:
            (beside / name).chmod(mode)  # safetensors makes its files private
            os.replace(beside / name, folder / name)
    for name in set(existing) - set(written):  # shards and a picture of an earlier save
        (folder / name).unlink()
    return folder


def _with_base_model(card: Card, model: nn.Module) -> Card:
    """Name the repository that the weights were loaded from; a file or a bare network has none that is known."""
    if card.base_model is not None:
        return card
    source = getattr(model, "weights_from", None)
    if source is None and card.converted:
        source = getattr(model, "pretrained_cfg", {}).get("hf_hub_id")
        if source is None:
            raise ValueError("the card says that these weights are converted; name their repository (base_model)")
    return card.based_on(source)


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
    config: dict[str, Any] = json.loads(file.read_text())
    config["architecture"] = architecture or config["architecture"]
    config["pretrained_cfg"].pop("label_names", None)  # they are at the root
    if getattr(model, "from_scratch", False):  # nothing of the configuration's source is in these weights
        for key in ("tag", "license", "origin_url", "paper_name", "paper_ids", "description", "notes"):
            config["pretrained_cfg"].pop(key, None)
    # transformers passes num_classes itself and fails on a second one; timm reads it at the root
    config.get("model_args", {}).pop("num_classes", None)
    file.write_text(json.dumps(config, indent=2) + "\n")
    return config


def _name_and_options(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The zoo name that builds this model again, and the graph options to build it with."""
    stage = next(iter(require_dynamic(model).values()))
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture") or ""
    if not architecture.startswith("dg_"):
        architecture = f"dg_{architecture}"
    if not is_model(architecture):
        raise ValueError(
            f"{type(model).__name__} can't be saved: the zoo has no {architecture!r} that timm could load it back by; "
            'see timm.list_models("dg_*"), or keep its state_dict()'
        )
    options = {key: False for key in ("edge_scale", "block_shortcut") if not getattr(stage, key)}
    return architecture, options


# -- publishing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Publication:
    """What a publish did.

    Attributes:
        repo_id: of the repository.
        url: of the commit, or of the pull request.
        commit: its 40 hexadecimal digits; if nothing changed, the one that was there.
        changed: False if the repository held the same content already; there is no new commit then.
        files: names of what the repository holds of this network.
    """

    repo_id: str
    url: str
    commit: str
    changed: bool
    files: tuple[str, ...]


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: Optional[bool] = None,
    revision: Optional[str] = None,
    create_pr: bool = False,
    commit_message: Optional[str] = None,
    token: Union[str, bool, None] = None,
    **saving: Any,
) -> Publication:
    """Save a network (see :func:`save_pretrained` for ``**saving``) and publish it on the Hub.

    Args:
        model: as for :func:`save_pretrained`.
        repo_id: "owner/name"; made if missing.
        private, revision, create_pr, commit_message, token: see :func:`push_folder`.
    """
    _check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_pretrained(model, Path(scratch) / "model", **saving)
        return push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
        )


def push_folder(
    folder: Folder,
    repo_id: str,
    *,
    private: Optional[bool] = None,
    revision: Optional[str] = None,
    create_pr: bool = False,
    commit_message: Optional[str] = None,
    token: Union[str, bool, None] = None,
) -> Publication:
    """Publish a folder that :func:`save_pretrained` wrote: what :func:`planned_files` lists, in one commit.

    The same content makes no new commit. Of what the repository holds already, only weights in our layout that the
    folder no longer has (shards of an earlier publication) are deleted.

    Args:
        folder: complete and sound, or nothing is sent.
        repo_id: "owner/name"; made if missing.
        private: True makes a private repository, and refuses one that exists and is public. None: as it is, or public.
        revision: branch to commit to, made from ``main`` if missing; by default ``main``.
        create_pr: open a pull request instead, for a repository of others.
        commit_message: by default the network's name and the version of dg_timm.
        token: of the Hub; by default that of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        ValueError: if the folder is incomplete or damaged, the id is none, or a private network would become public.
        HfHubHTTPError: if the Hub refuses; its message says what to do.
    """
    _check_repo_id(repo_id)
    contents = planned_files(folder, repo_id)
    architecture = json.loads((Path(folder) / CONFIG).read_text())["architecture"]
    api = HfApi(token=token, library_name="dg_timm", library_version=__version__)
    try:
        _prepare_repository(api, repo_id, private, revision, create_pr)
        before = api.model_info(repo_id, revision=revision)
        stale = [
            file.rfilename
            for file in before.siblings or ()
            if _WEIGHTS.fullmatch(file.rfilename) and file.rfilename not in contents
        ]
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(name) for name in stale)],
            commit_message=commit_message or f"{architecture}, saved by dg_timm {__version__}",
            revision=revision,
            create_pr=create_pr,
        )
    except HfHubHTTPError as error:
        error.append_to_message(_advice(error, repo_id))
        raise
    return Publication(
        repo_id, commit.pr_url or str(commit.commit_url), commit.oid, commit.oid != before.sha, tuple(contents)
    )


def planned_files(folder: Folder, repo_id: str) -> dict[str, Union[str, bytes]]:
    """What a publication of this folder sends: name in the repository -> path, or content where it differs.

    Raises:
        ValueError: if a file is missing, damaged, or not of a network that dg_timm can load.
    """
    folder = Path(folder)
    names = _files_in(folder)
    missing = [name for name in (CONFIG, README) if name not in names]
    if missing or not any(_WEIGHTS.fullmatch(name) for name in names):
        missing = missing or ["model.safetensors"]
        raise ValueError(f"{folder} has no {' and no '.join(missing)}; give a folder that save_pretrained wrote")
    try:
        architecture = json.loads((folder / CONFIG).read_text()).get("architecture", "")
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON: {error}") from error
    if not (architecture.startswith("dg_") and is_model(architecture)):
        raise ValueError(f"{folder / CONFIG} names the architecture {architecture!r}, which dg_timm does not have")
    _check_weights(folder, names)
    text = with_address((folder / README).read_text(), repo_id)
    try:
        ModelCard(text)
    except Exception as error:  # yaml's and huggingface_hub's own kinds
        raise ValueError(f"{folder / README} has no valid front matter: {error}") from error
    return {name: text.encode() if name == README else str(folder / name) for name in names}


def _files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.is_file() and _OURS.fullmatch(path.name))


def _check_weights(folder: Path, names: Sequence[str]) -> None:
    single, index = "model.safetensors", "model.safetensors.index.json"
    wanted = [single]
    if index in names:
        if single in names:
            raise ValueError(f"{folder} holds both {single} and shards; delete what is not of this network")
        wanted = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards != wanted:
        raise ValueError(f"{folder} should hold the weights {', '.join(wanted)}, and holds {', '.join(shards)}")
    for name in shards:
        try:
            with safe_open(folder / name, "pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from error


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f'{repo_id!r} names no owner; give "owner/{repo_id}"')


def _prepare_repository(
    api: HfApi, repo_id: str, private: Optional[bool], revision: Optional[str], create_pr: bool
) -> None:
    try:
        exists = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private, exist_ok=True)
    else:
        if private and exists.private is False:
            raise ValueError(
                f"{repo_id} exists and is public; nothing was sent. Make it private in its settings on the Hub, or "
                "give another name"
            )
    if revision not in (None, "main") and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _advice(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401:
        return "\nThe Hub does not know you: `hf auth login`, or set HF_TOKEN to a token that may write."
    if status == 403:
        return (
            f"\nYour token may not write to {repo_id}: use one with write access to {repo_id.partition('/')[0]}, or "
            "open a pull request (create_pr)."
        )
    return f"\n{repo_id} was not published; what it held is unchanged."
