"""What the outputs of a classifier mean: one class, several, or a share of each. config.json remembers it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from huggingface_hub import try_to_load_from_cache
from torch import nn

from dg_timm.hub.layout import CONFIG

# The losses by which each task may learn; the first one is the default.
LOSSES = {"single": ("ce", "bce"), "multilabel": ("bce", "asl", "poly", "zlpr"), "soft": ("ce", "bce")}


class Labeling(NamedTuple):
    """What a network was trained to say of an image.

    Attributes:
        task: ``single`` (one class), ``multilabel`` (any number of classes) or ``soft`` (a share or score of each).
        loss: by which it learned; one of ``LOSSES[task]``.
    """

    task: str = "single"
    loss: str = "ce"

    @property
    def independent(self) -> bool:
        """Whether each class has a probability of its own (a sigmoid), in place of a share of one (a softmax)."""
        return self.task == "multilabel" or (self.task == "soft" and self.loss == "bce")

    def describe(self) -> dict[str, str]:
        """Return what config.json keeps of it; nothing for a single class, which every reader takes for granted."""
        return {} if self.task == "single" else self._asdict()


SINGLE = Labeling()


def labeling_in(config: Mapping[str, Any]) -> Labeling:
    """Read what the outputs of a network mean from the content of its config.json."""
    noted = config.get("dg_timm") or {}
    task, loss = str(noted.get("task")), str(noted.get("loss"))
    if loss in LOSSES.get(task, ()):
        return Labeling(task, loss)
    several = config.get("problem_type") == "multi_label_classification"  # transformers' word for it
    return Labeling("multilabel", "bce") if several else SINGLE


def labeling_of(model: nn.Module) -> Labeling:
    """Return what the outputs of a network mean: what was noted as ``model.labeling``, or what its source says."""
    noted = getattr(model, "labeling", None)
    return noted if isinstance(noted, Labeling) else find_labeling(model)


def find_labeling(model: nn.Module) -> Labeling:
    """Read what the outputs mean from the config.json that a network was built from; a single class without one.

    Args:
        model: a timm model. With a classifier of another size it is none of the source's any more.
    """
    cfg = getattr(model, "pretrained_cfg", {})
    if cfg.get("num_classes") != getattr(model, "num_classes", None):
        return SINGLE
    file = _config_file(cfg)
    try:
        return SINGLE if file is None else labeling_in(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):  # whoever builds from such a file has said what is wrong with it
        return SINGLE


def _config_file(cfg: Mapping[str, Any]) -> Optional[Path]:
    """Find the config.json that timm read; that of a repository is in the cache then."""
    if cfg.get("source") == "local-dir" and cfg.get("file"):
        return Path(cfg["file"]) / CONFIG
    if cfg.get("source") == "hf-hub" and cfg.get("hf_hub_id"):
        repo_id, _, revision = str(cfg["hf_hub_id"]).partition("@")
        found = try_to_load_from_cache(repo_id, CONFIG, revision=revision or None)
        return Path(found) if isinstance(found, str) else None
    return None
