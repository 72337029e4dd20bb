"""Find the weights that a configuration names: on the Hub or in a folder, sharded or not, retried and verified.

timm would fetch them too, but reads no shards, retries less, and takes a damaged file for the one that was published.
"""

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Optional, Union

import safetensors.torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor

from dg_timm.version import __version__

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_PICKLE = "pytorch_model.bin"  # timm reads it with weights_only=True: tensors, and nothing that could run
_ATTEMPTS = 3
# what the client raises when a connection breaks: of the HTTP library that its release is built on
_TRANSPORT: tuple[type[Exception], ...] = (HfHubHTTPError.__mro__[1], OSError)
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
        names = _shards(folder / INDEX)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder / INDEX} names {', '.join(missing)}, which is not there; copy the whole folder")
        return {"source": "", "state_dict": _merge([folder / name for name in names])}
    if (cfg.get("source") != "hf-hub" and (cfg.get("state_dict") or cfg.get("file"))) or not cfg.get("hf_hub_id"):
        return {}
    repo_id, _, revision = str(cfg["hf_hub_id"]).partition("@")
    where = _Repository(repo_id, revision or None, cache_dir)
    candidates = (cfg["hf_hub_filename"],) if cfg.get("hf_hub_filename") else (WEIGHTS, INDEX, _PICKLE)
    unreachable: Optional[LocalEntryNotFoundError] = None
    for name in candidates:
        try:
            file = where.download(name)
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error
        except EntryNotFoundError:
            pass
        else:
            if name == INDEX:
                return {"source": "", "state_dict": _merge([where.download(shard) for shard in _shards(file)])}
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

    def download(self, name: str) -> Path:
        """The file in the cache, whose content has the SHA-256 that the Hub gave for it."""
        failure = ""
        for attempt in range(_ATTEMPTS):
            time.sleep(attempt)
            try:
                file = self._fetch(name)
            except EntryNotFoundError:
                raise
            except _TRANSPORT as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                    raise
                failure = str(error)
            else:
                if _is_sound(file):
                    return file
                file.resolve().unlink()
                file.unlink(missing_ok=True)
                failure = (
                    "its content does not have the SHA-256 that the Hub gives for it; a proxy or mirror on the way "
                    "changes it, or the repository is damaged. Nothing of it is kept"
                )
            _log.warning("%s of %s, attempt %d of %d: %s", name, self, attempt + 1, _ATTEMPTS, failure)
        raise OSError(f"{name} of {self} could not be downloaded in {_ATTEMPTS} attempts: {failure}")

    def _fetch(self, name: str) -> Path:
        path = hf_hub_download(
            self.repo_id,
            name,
            revision=self.revision,
            cache_dir=self.cache_dir,
            library_name="dg_timm",
            library_version=__version__,
        )
        return Path(path)


def _is_sound(file: Path) -> bool:
    """Whether a file of the cache has the content that its blob is named after, where that is a SHA-256."""
    if not file.is_symlink():
        return True  # a cache without links does not keep the hash
    announced = Path(os.readlink(file)).name
    if not re.fullmatch("[0-9a-f]{64}", announced):
        return True  # a small file, which git names by another hash
    digest = sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == announced


def _shards(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from error
    outside = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}: a shard must be a .safetensors file beside its index")
    return names


def _merge(files: list[Path]) -> dict[str, Tensor]:
    return {key: value for file in files for key, value in safetensors.torch.load_file(file).items()}
