"""Find the weights that a configuration names: on the Hub or in a folder, sharded or not, retried and verified.

timm fetches them too. But it reads no shards, retries less, and takes a damaged file for the one that was published.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Mapping
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any, Optional, Union

import safetensors.torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor

from dg_timm._errors import BadValue, UserError
from dg_timm._version import __version__
from dg_timm.hub.layout import CONFIG, INDEX, WEIGHTS, shards_of

_PICKLE = "pytorch_model.bin"  # timm reads it with weights_only=True: tensors, and nothing that could run
_ATTEMPTS = 3
# Every release of the client has its own HTTP library. The client's error derives from the base of that library's.
NETWORK_ERRORS: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)
_log = logging.getLogger(__name__)

Folder = Union[str, Path]


class DownloadError(UserError, OSError):
    """Weights that can't be had: not there, refused, or damaged on the way. The message says what to do."""


def locate_weights(cfg: Mapping[str, Any], cache_dir: Optional[Folder] = None) -> dict[str, Any]:
    """Say what to lay over a pretrained configuration so that timm reads verified weights from this machine.

    Args:
        cfg: the configuration as timm resolved it; ``source``, ``hf_hub_id`` (``@revision``), ``hf_hub_filename`` and
            ``file`` are read.
        cache_dir: cache of the Hub's files, in place of the default.

    Returns:
        ``file`` or ``state_dict``, with ``source`` cleared; nothing where timm needs no help (a file, a state dict, a
        plain URL).

    Raises:
        DownloadError: if the repository has no weights, the Hub refuses them or can't be reached and they are not in
            the cache, or a download stays damaged.
        BadValue: if an index names shards that are not files beside it.
    """
    if cfg.get("source") == "local-dir":
        return _in_folder(Path(cfg["file"]))
    if (cfg.get("source") != "hf-hub" and (cfg.get("state_dict") or cfg.get("file"))) or not cfg.get("hf_hub_id"):
        return {}
    repo_id, _, revision = str(cfg["hf_hub_id"]).partition("@")
    repository = _Repository(repo_id, revision or None, cache_dir)
    repository.check_cached(CONFIG)  # timm has read it already
    return _in_repository(repository, cfg.get("hf_hub_filename"))


def _in_folder(folder: Path) -> dict[str, Any]:
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return {}
    names = shards_of(folder / INDEX)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadValue(f"{folder / INDEX} names {', '.join(missing)}, which is not there; copy the whole folder")
    return {"source": "", "state_dict": _merge([folder / name for name in names])}


def _in_repository(repository: "_Repository", name: Optional[str]) -> dict[str, Any]:
    """Download the weights; of the names that they may have, the first that is there counts."""
    candidates = (name,) if name else (WEIGHTS, INDEX, _PICKLE)
    unreachable: Optional[LocalEntryNotFoundError] = None
    for candidate in candidates:
        try:
            file = repository.download(candidate, only_cached=unreachable is not None)
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error
        except EntryNotFoundError:
            pass
        else:
            if candidate == INDEX:
                return {"source": "", "state_dict": _merge([repository.download(shard) for shard in shards_of(file)])}
            return {"source": "", "file": str(file)}
    if unreachable is not None:
        raise DownloadError(
            f"the weights of {repository} are not in the cache and can't be fetched from the Hub: "
            f"{unreachable.__cause__ or unreachable}. Connect (or unset HF_HUB_OFFLINE) and try again, or copy a "
            'folder with them to this machine and load "local-dir:FOLDER"'
        ) from unreachable
    raise DownloadError(f"{repository} has no weights: none of {', '.join(candidates)}")


class _Repository:
    """A model repository on the Hub at a revision."""

    def __init__(self, repo_id: str, revision: Optional[str], cache_dir: Optional[Folder]) -> None:
        self.repo_id, self.revision, self.cache_dir = repo_id, revision, cache_dir

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    def check_cached(self, name: str) -> None:
        """Delete a damaged small file from the cache: timm, which read it, does not compare hashes."""
        revision = self.revision or "main"
        file = try_to_load_from_cache(self.repo_id, name, revision=revision, cache_dir=self.cache_dir)
        if isinstance(file, str) and not _hash_matches(Path(file)):
            _remove(Path(file))
            raise DownloadError(
                f"{name} of {self} in the cache does not have the hash that the Hub gave for it. It was deleted; try "
                "again"
            )

    def download(self, name: str, only_cached: bool = False) -> Path:
        """Fetch a file into the cache; its content has the SHA-256 that the Hub gave for it."""
        failure, damaged = "", False
        for attempt in range(_ATTEMPTS):
            time.sleep(attempt)
            try:
                file = self._fetch(name, only_cached, again=damaged)
            except EntryNotFoundError:
                raise
            except ValueError as error:  # offline, it can't be fetched again
                if not damaged:
                    raise
                raise DownloadError(
                    f"{name} of {self} in the cache is damaged (its content does not have the SHA-256 that the Hub "
                    "gave for it), and there is no connection to fetch it again"
                ) from error
            except NETWORK_ERRORS as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                    raise DownloadError(f"the Hub refused {name} of {self}: {error}") from error
                failure = str(error)
            else:
                damaged = not _hash_matches(file)
                if not damaged:
                    return file
                failure = (
                    "its content does not have the SHA-256 that the Hub gives for it; a proxy or mirror on the way "
                    "changes it, or the repository is damaged. Nothing of it is kept"
                )
            _log.warning("%s of %s, attempt %d of %d: %s", name, self, attempt + 1, _ATTEMPTS, failure)
        if damaged:
            _remove(file)
        raise DownloadError(f"{name} of {self} could not be downloaded in {_ATTEMPTS} attempts: {failure}")

    def _fetch(self, name: str, only_cached: bool, again: bool) -> Path:
        path = hf_hub_download(
            self.repo_id,
            name,
            revision=self.revision,
            cache_dir=self.cache_dir,
            local_files_only=only_cached,
            force_download=again,
            library_name="dg_timm",
            library_version=__version__,
        )
        return Path(path)


def _hash_matches(file: Path) -> bool:
    """Compare a cached file with the hash that its blob is named after: SHA-256, or git's SHA-1 if it is small."""
    if not file.is_symlink():
        return True  # a cache without links does not keep the hash
    announced = Path(os.readlink(file)).name
    if re.fullmatch("[0-9a-f]{64}", announced):
        digest = sha256()
    elif re.fullmatch("[0-9a-f]{40}", announced):
        digest = sha1(b"blob %d\0" % file.stat().st_size)
    else:
        return True
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == announced


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):  # a cache that is shared may be read-only
        file.resolve().unlink()
        file.unlink(missing_ok=True)


def _merge(files: list[Path]) -> dict[str, Tensor]:
    return {key: value for file in files for key, value in safetensors.torch.load_file(file).items()}
