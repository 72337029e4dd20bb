"""Publish a saved network on the Hugging Face Hub: the listed files, in one commit, and none where nothing changed."""

import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from dg_timm._errors import BadValue, UserError
from dg_timm._version import __version__
from dg_timm.hub.downloads import NETWORK_ERRORS
from dg_timm.hub.layout import CONFIG, WEIGHT_FILES
from dg_timm.hub.planning import planned_files, read_config
from dg_timm.hub.save import save_pretrained

_ATTEMPTS = 3  # where the Hub is busy
_MAYBE = "It may or may not have been published: publish again, the same content makes no second commit."

Folder = Union[str, "os.PathLike[str]"]


class PublishError(UserError, OSError):
    """The Hub refused, or the connection broke. The message says what to do; ``__cause__`` is the client's error."""


@dataclass(frozen=True)
class Publication:
    """What a publication did.

    Attributes:
        repo_id: repository, "owner/name".
        url: address of the commit, or of the pull request.
        commit: hash of the commit, 40 hexadecimal digits; if nothing changed, of the one that was there.
        changed: False if the repository held the same content already; then there is no new commit.
        files: names of this network's files in the repository.
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
    """Save a network and publish it on the Hub.

    Args:
        model: a dynamic graph network, as for :func:`dg_timm.save_pretrained`.
        repo_id: repository, "owner/name"; it is made if missing.
        private: True makes a private repository, and refuses one that exists and is public. None makes a public one.
        revision: branch to commit to, made from ``main`` if missing; by default ``main``.
        create_pr: open a pull request instead of a commit; every call opens one.
        commit_message: by default the network's name and the version of dg_timm.
        token: token of the Hub; by default that of ``hf auth login`` or ``HF_TOKEN``.
        **saving: further arguments of :func:`dg_timm.save_pretrained`, such as ``card`` and ``label_names``.

    Raises:
        BadValue, BadType: if the network can't be saved, the id is not valid, or a private network would become public.
        PublishError: if the Hub refuses or can't be reached.

    >>> import dg_timm, timm
    >>> model = timm.create_model("dg_cifar_resnet20")
    >>> done = dg_timm.push_to_hub(model, "your-name/my-network")
    >>> done.files
    ('README.md', 'config.json', 'model.safetensors')
    """
    check_repo_id(repo_id)
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

    The same content makes no new commit. Of the files that the repository holds already, only weights of an earlier
    publication that the folder no longer has (shards) are deleted.

    Args:
        folder: a complete and valid folder; from any other one nothing is sent.
        repo_id: repository, "owner/name"; it is made if missing.
        private: True makes a private repository, and refuses one that exists and is public. None makes a public one,
            or leaves it as it is.
        revision: branch to commit to, made from ``main`` if missing; by default ``main``.
        create_pr: open a pull request instead, for somebody else's repository; every call opens one.
        commit_message: by default the network's name and the version of dg_timm.
        token: token of the Hub; by default that of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        BadValue: if the folder is incomplete or damaged, the id is not valid, or a private network would become public.
        PublishError: if the Hub refuses or can't be reached; the message says what to do.
    """
    check_repo_id(repo_id)
    if revision is not None and not re.fullmatch(r"\w[\w./-]*", revision):
        raise BadValue(f"revision must be the name of a branch, got {revision!r}")
    contents = planned_files(folder, repo_id)
    message = commit_message or f"{read_config(Path(folder) / CONFIG)['architecture']}, saved by dg_timm {__version__}"
    api = HfApi(token=_clean(token), library_name="dg_timm", library_version=__version__)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _publish(api, contents, repo_id, private, revision, create_pr, message)
        except HfHubHTTPError as error:
            status = error.response.status_code
            again = status == 429 or (status in (500, 502, 503, 504) and not create_pr)  # it may be open already
            if not again or attempt == _ATTEMPTS:
                raise PublishError(f"{error}\n{_advice(status, repo_id)}") from error
            wait = error.response.headers.get("Retry-After", "")
            time.sleep(float(wait) if wait.isdigit() else attempt)
        except UserError:
            raise
        except NETWORK_ERRORS as error:
            raise PublishError(f"the connection to {api.endpoint} broke: {error}. {_MAYBE}") from error
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
    operations: list[CommitOperationAdd | CommitOperationDelete]
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    try:
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    except ValueError as error:  # the Hub reads the card's front matter before it takes the files
        raise PublishError(f"the Hub does not accept this card, and nothing was published: {error}") from error
    url = commit.pr_url or str(commit.commit_url)
    return Publication(repo_id, url, commit.oid, commit.oid != before.sha, tuple(contents))


def _clean(token: Union[str, bool, None]) -> Union[str, bool, None]:
    """Strip the line end of the file that a token was read from; the HTTP library would quote it in its error."""
    if not isinstance(token, str):
        return token
    token = token.strip()
    if not re.fullmatch(r"[\w.-]+", token, re.ASCII):
        raise BadValue("the token holds characters that no token has (it is not shown here); copy it again")
    return token


def check_repo_id(repo_id: str) -> None:
    """Raise BadValue unless this is "owner/name", as the Hub takes it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise BadValue(f"{repo_id!r} is not a repository id: {error}") from error
    if "/" not in repo_id:
        raise BadValue(f'{repo_id!r} names no owner; give "owner/{repo_id}"')


def _prepare_repository(
    api: HfApi, repo_id: str, private: Optional[bool], revision: Optional[str], create_pr: bool
) -> None:
    try:
        exists = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if create_pr:
            raise BadValue(f"{repo_id} does not exist, or is hidden from this token: a pull request needs it") from None
        api.create_repo(repo_id, private=private, exist_ok=True)
    else:
        if private and exists.private is False:
            raise BadValue(
                f"{repo_id} exists and is public; nothing was sent. Make it private in its settings on the Hub, or "
                "give another name"
            )
    if revision not in (None, "main") and not revision.startswith("refs/") and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _advice(status: int, repo_id: str) -> str:
    if status == 401:
        return "Authentication failed (401). Run `hf auth login`, or set HF_TOKEN to a token that may write."
    if status == 403:
        return (
            f"Your token may not write to {repo_id}: use one with write access to {repo_id.partition('/')[0]}, or open "
            "a pull request (create_pr)."
        )
    if status >= 500:
        return _MAYBE
    return f"{repo_id} was not published; its content is unchanged."
