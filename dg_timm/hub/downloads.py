"""Find the weights that a configuration names: on the Hub or in a folder, sharded or not, retried and verified.

timm would fetch them too, but reads no shards, retries less, and takes a damaged file for the one that was published.
"""

import contextlib
import json
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

from dg_timm._version import __version__

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_PICKLE = "pytorch_model.bin"  # timm reads it with weights_only=True: tensors, and nothing that could run
_ATTEMPTS = 3
# what the client raises when a connection breaks: of the HTTP library that its release is built on
TRANSPORT: tuple[type[Exception], ...] = (HfHubHTTPError.__mro__[1], OSError)
_log = logging.getLogger(__name__)

Folder = Union[str, Path]


def locate(cfg: Mapping[str, Any], cache_dir: Optional[Folder] = None) -> dict[str, Any]:
    """What to lay over a pretrained configuration so that timm reads verified weights from this machine.

    Args:
        cfg: as timm resolved it; ``source``, ``hf_hub_id`` (``@revision``), ``hf_hub_filename`` and ``file`` count.
        cache_dir: of the Hub's files, in place of the default.

    Returns:
        ``file`` or ``state_dict``, with ``source`` cleared; nothing where timm needs no help (a file, a state dict, a
        plain URL).

    Raises:
        LocalEntryNotFoundError: if the Hub can't be reached and the weights are not in the cache.
        EntryNotFoundError: if the repository has no weights.
        OSError: if a download stays damaged.
        ValueError: if an index names shards that are not files beside it.
    """
    if cfg.get("source") == "local-dir":
        folder = Path(cfg["file"])
        if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
            return {}
        names = shards_of(folder / INDEX)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder / INDEX} names {', '.join(missing)}, which is not there; copy the whole folder")
        return {"source": "", "state_dict": _merge([folder / name for name in names])}
    if (cfg.get("source") != "hf-hub" and (cfg.get("state_dict") or cfg.get("file"))) or not cfg.get("hf_hub_id"):
        return {}
    repo_id, _, revision = str(cfg["hf_hub_id"]).partition("@")
    where = _Repository(repo_id, revision or None, cache_dir)
    where.check_cached("config.json")  # timm has read it already
    candidates = (cfg["hf_hub_filename"],) if cfg.get("hf_hub_filename") else (WEIGHTS, INDEX, _PICKLE)
    unreachable: Optional[LocalEntryNotFoundError] = None
    for name in candidates:
        try:
            file = where.download(name, only_cached=unreachable is not None)
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error
        except EntryNotFoundError:
            pass
        else:
            if name == INDEX:
                return {"source": "", "state_dict": _merge([where.download(shard) for shard in shards_of(file)])}
            return {"source": "", "file": str(file)}
    if unreachable is not None:
        raise LocalEntryNotFoundError(
            f"the weights of {where} are not in the cache and can't be fetched from the Hub: "
            f"{unreachable.__cause__ or unreachable}. Connect (or unset HF_HUB_OFFLINE) and try again, or copy a "
            'folder with them to this machine and load "local-dir:FOLDER"'
        ) from unreachable
    raise EntryNotFoundError(f"{where} has no weights: none of {', '.join(candidates)}")


class _Repository:
    """A model repository on the Hub at a revision."""

    def __init__(self, repo_id: str, revision: Optional[str], cache_dir: Optional[Folder]) -> None:
        self.repo_id, self.revision, self.cache_dir = repo_id, revision, cache_dir

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    def check_cached(self, name: str) -> None:
        """Delete a damaged small file from the cache, which whoever read it could not know."""
        revision = self.revision or "main"
        file = try_to_load_from_cache(self.repo_id, name, revision=revision, cache_dir=self.cache_dir)
        if isinstance(file, str) and not _is_sound(Path(file)):
            _remove(Path(file))
            raise OSError(
                f"{name} of {self} in the cache does not have the hash that the Hub gave for it. It was deleted; try "
                "again"
            )

    def download(self, name: str, only_cached: bool = False) -> Path:
        """The file in the cache, whose content has the SHA-256 that the Hub gave for it."""
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
                raise OSError(
                    f"{name} of {self} in the cache is damaged (its content does not have the SHA-256 that the Hub "
                    "gave for it), and there is no connection to fetch it again"
                ) from error
            except TRANSPORT as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                    raise
                failure = str(error)
            else:
                damaged = not _is_sound(file)
                if not damaged:
                    return file
                failure = (
                    "its content does not have the SHA-256 that the Hub gives for it; a proxy or mirror on the way "
                    "changes it, or the repository is damaged. Nothing of it is kept"
                )
            _log.warning("%s of %s, attempt %d of %d: %s", name, self, attempt + 1, _ATTEMPTS, failure)
        if damaged:
            _remove(file)
        raise OSError(f"{name} of {self} could not be downloaded in {_ATTEMPTS} attempts: {failure}")

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


def _is_sound(file: Path) -> bool:
    """Whether a file of the cache has the content that its blob is named after: by SHA-256, or git's SHA-1 if small."""
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


def shards_of(index: Path) -> list[str]:
    """Names of the files that an index of shards is for; ValueError if it is none."""
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from error
    outside = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}: a shard must be a .safetensors file beside its index")
    return names


def _merge(files: list[Path]) -> dict[str, Tensor]:
    return {key: value for file in files for key, value in safetensors.torch.load_file(file).items()}
