"""Publish a saved network on the Hugging Face Hub: the listed files, in one commit, and none where nothing changed."""

import json
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from timm.models import is_model
from torch import nn

from dg_timm._version import __version__
from dg_timm.conversion.state_dict import check_fit
from dg_timm.hub.card import PICTURE, with_address
from dg_timm.hub.downloads import INDEX, TRANSPORT, WEIGHTS, shards_of
from dg_timm.hub.save import CONFIG, README, WEIGHT_FILES, built_from, files_in, save_pretrained

_ATTEMPTS = 3  # where the Hub is busy

Folder = Union[str, "os.PathLike[str]"]


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
        create_pr: open a pull request instead, for a repository of others; every call opens one.
        commit_message: by default the network's name and the version of dg_timm.
        token: of the Hub; by default that of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        ValueError: if the folder is incomplete or damaged, the id is none, or a private network would become public.
        HfHubHTTPError: if the Hub refuses; its message says what to do.
    """
    _check_repo_id(repo_id)
    if revision is not None and not re.fullmatch(r"\w[\w./-]*", revision):
        raise ValueError(f"revision must be the name of a branch, got {revision!r}")
    contents = planned_files(folder, repo_id)
    message = commit_message or f"{_read_config(Path(folder) / CONFIG)['architecture']}, saved by dg_timm {__version__}"
    api = HfApi(token=_clean(token), library_name="dg_timm", library_version=__version__)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _publish(api, contents, repo_id, private, revision, create_pr, message)
        except HfHubHTTPError as error:
            status = error.response.status_code
            again = status == 429 or (status in (500, 502, 503, 504) and not create_pr)  # it may be open already
            if not again or attempt == _ATTEMPTS:
                error.append_to_message(_advice(status, repo_id))
                raise
            wait = error.response.headers.get("Retry-After", "")
            time.sleep(float(wait) if wait.isdigit() else attempt)
        except TRANSPORT as error:
            raise OSError(f"the connection to {api.endpoint} broke: {error}.{_MAYBE}") from error
    raise AssertionError  # the last attempt returns or raises


def _publish(
    api: HfApi,
    contents: Mapping[str, Union[str, bytes]],
    repo_id: str,
    private: Optional[bool],
    revision: Optional[str],
    create_pr: bool,
    message: str,
) -> Publication:
    _prepare_repository(api, repo_id, private, revision, create_pr)
    before = api.model_info(repo_id, revision=revision)
    stale = [
        file.rfilename
        for file in before.siblings or ()
        if WEIGHT_FILES.fullmatch(file.rfilename) and file.rfilename not in contents
    ]
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    commit = api.create_commit(
        repo_id,
        [*operations, *(CommitOperationDelete(name) for name in stale)],
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
    )
    url = commit.pr_url or str(commit.commit_url)
    return Publication(repo_id, url, commit.oid, commit.oid != before.sha, tuple(contents))


def _clean(token: Union[str, bool, None]) -> Union[str, bool, None]:
    """The token without the line end of the file it was read from; an HTTP library would quote it in its error."""
    if not isinstance(token, str):
        return token
    token = token.strip()
    if not re.fullmatch(r"[\w.-]+", token, re.ASCII):
        raise ValueError("the token holds characters that no token has (it is not shown here); copy it again")
    return token


def planned_files(folder: Folder, repo_id: str) -> dict[str, Union[str, bytes]]:
    """What a publication of this folder sends: name in the repository -> path, or content where it differs.

    Raises:
        ValueError: if a file is missing, damaged, or not of a network that dg_timm can load.
    """
    folder = Path(folder)
    names = files_in(folder)
    missing = [name for name in (CONFIG, README) if name not in names]
    if missing or not any(WEIGHT_FILES.fullmatch(name) for name in names):
        missing = missing or ["model.safetensors"]
        raise ValueError(f"{folder} has no {' and no '.join(missing)}; give a folder that save_pretrained wrote")
    try:
        text = with_address((folder / README).read_text(encoding="utf-8"), repo_id)
        card = ModelCard(text)
    except Exception as error:  # yaml's and huggingface_hub's own kinds
        raise ValueError(f"{folder / README} has no valid front matter: {error}") from error
    if not card.data.to_dict():
        raise ValueError(f"{folder / README} has no front matter (license, tags, ... between --- lines)")
    if f"]({PICTURE})" not in text:
        names = [name for name in names if name != PICTURE]  # not of this card
    _check_weights(folder, names, _read_config(folder / CONFIG))
    return {name: text.encode() if name == README else str(folder / name) for name in names}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not (isinstance(architecture, str) and architecture.startswith("dg_") and is_model(architecture)):
        raise ValueError(f"{file} names the architecture {architecture!r}, which dg_timm does not have")
    assert isinstance(config, dict)
    return config


def _check_weights(folder: Path, names: Sequence[str], config: Mapping[str, Any]) -> None:
    wanted = [WEIGHTS]
    if INDEX in names:
        if WEIGHTS in names:
            raise ValueError(f"{folder} holds both {WEIGHTS} and shards; delete what is not of this network")
        wanted = shards_of(folder / INDEX)
    found = [name for name in names if name.endswith(".safetensors")]
    if found != wanted:
        raise ValueError(f"{folder} should hold the weights {', '.join(wanted)}, and holds {', '.join(found)}")
    tensors: dict[str, Any] = {}
    for name in found:
        try:
            with safe_open(folder / name, "pt") as file:
                tensors |= {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from error
    try:
        check_fit(built_from(config), tensors)
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe the network in {', '.join(found)}: {error}") from error


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
        if create_pr:
            raise ValueError(f"{repo_id} is not there, or hidden from this token: a pull request needs it") from None
        api.create_repo(repo_id, private=private, exist_ok=True)
    else:
        if private and exists.private is False:
            raise ValueError(
                f"{repo_id} exists and is public; nothing was sent. Make it private in its settings on the Hub, or "
                "give another name"
            )
    if revision not in (None, "main") and not revision.startswith("refs/") and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


_MAYBE = " It may or may not have been published: publish again, the same content makes no second commit."


def _advice(status: int, repo_id: str) -> str:
    if status == 401:
        return "\nThe Hub does not know you: `hf auth login`, or set HF_TOKEN to a token that may write."
    if status == 403:
        return (
            f"\nYour token may not write to {repo_id}: use one with write access to {repo_id.partition('/')[0]}, or "
            "open a pull request (create_pr)."
        )
    if status >= 500:
        return f"\n{_MAYBE.strip()}"
    return f"\n{repo_id} was not published; what it held is unchanged."
