"""Repositories of timm's static models, made when first asked for."""

import hashlib
import threading
from pathlib import Path
from typing import Optional

from tests.helpers.loopback_hub.repositories import HubFile, not_found


class StaticTimmModels:
    """The repositories ``timm/<architecture>.<tag>``, with random weights.

    Names, shapes and number of classes are those of the static timm model with this tag, and that is all a test of
    loading can depend on. Files are made when first asked for, once for every architecture and number of classes.

    timm is imported only when a file is asked for: a process that talks to its own server sets ``HF_ENDPOINT`` first.

    Args:
        folder: where the files are kept; whoever made it deletes it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, HubFile] = {}
        self._lock = threading.Lock()

    def file(self, repo_id: str, revision: str, name: str, token: Optional[str] = None) -> tuple[HubFile, str]:
        """The file, and the one commit of the repository."""
        commit = hashlib.sha1(repo_id.encode()).hexdigest()
        file = self._file(repo_id, name)
        if revision not in ("main", commit):
            raise not_found("RevisionNotFound", f"{repo_id} has only main, not {revision}")
        return file, commit

    def _file(self, repo_id: str, filename: str) -> HubFile:
        from timm.models import get_pretrained_cfg, is_model_pretrained

        name = repo_id.removeprefix("timm/")
        cfg = get_pretrained_cfg(name) if is_model_pretrained(name) else None
        if cfg is None or cfg.hf_hub_id != repo_id:
            raise not_found("RepoNotFound", f"timm has no weights at {repo_id}")
        if filename == "model.safetensors":
            path, write = self._folder / f"{cfg.architecture}-{cfg.num_classes}.safetensors", _write_weights
        elif filename == "config.json":
            path, write = self._folder / f"{name}.json", _write_config
        else:
            raise not_found("EntryNotFound", f"{repo_id} has no {filename}")
        with self._lock:
            if path not in self._files:
                write(name, path)
                self._files[path] = HubFile.of(path)
            return self._files[path]


def _write_weights(name: str, path: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False)
    save_file(model.state_dict(), path, metadata={"format": "pt"})


def _write_config(name: str, path: Path) -> None:
    import timm
    from timm.models._hub import save_config_for_hf

    save_config_for_hf(timm.create_model(name, pretrained=False, device="meta"), str(path))
