"""config.json: how timm and transformers build a network again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import timm
from timm.models import is_model
from torch import nn

from dg_timm._compat import save_timm_config
from dg_timm._errors import BadValue
from dg_timm._files import atomic_path
from dg_timm._version import __version__
from dg_timm.graph.stage import BOOL_OPTIONS, graph_stages, require_dynamic
from dg_timm.hub.labeling import labeling_of
from dg_timm.hub.provenance import provenance_of

# What timm publishes with its weights, and other weights must not claim
_ORIGIN = ("tag", "license", "origin_url", "paper_name", "paper_ids", "description", "notes")


def write_config(
    model: nn.Module,
    file: Path,
    *,
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Mapping[str, Any]] = None,
) -> dict[str, Any]:
    """Write the config.json of a network, dynamic or static, and return its content.

    Args:
        model: a timm model, or a dynamic graph network that has a ``dg_`` name. What its outputs mean, where that is
            not a single class, is noted as ``model.labeling`` (:class:`dg_timm.hub.labeling.Labeling`).
        file: where it goes; it is replaced as a whole.
        label_names: one name for each class; by default those that the model was loaded with, if they still fit.
        data_config: preprocessing that differs from the model's own, as for :func:`dg_timm.save_pretrained`.

    Raises:
        BadValue: if the model is dynamic and no name would build it again.
    """
    dynamic = bool(graph_stages(model))
    architecture, model_args = name_and_options(model) if dynamic else (None, {})
    labels = list(label_names) if label_names is not None else _labels_of(model)
    labeling = labeling_of(model)
    with atomic_path(file) as temporary:
        save_timm_config(
            model,
            temporary,
            model_config={"label_names": labels, "dg_timm": {"version": __version__, **labeling.describe()}},
            model_args=model_args,
            data_config=dict(data_config or {}),
        )
        config: dict[str, Any] = json.loads(temporary.read_text(encoding="utf-8"))
        config["architecture"] = architecture or config["architecture"]
        config["pretrained_cfg"].pop("label_names", None)  # they are at the root
        if labeling.independent:
            config["problem_type"] = "multi_label_classification"  # transformers' pipeline takes the sigmoid then
        provenance = provenance_of(model)
        if dynamic if provenance is None else provenance.from_scratch:
            for key in _ORIGIN:
                config["pretrained_cfg"].pop(key, None)
        # transformers passes num_classes itself and fails on a second one; timm reads it at the root
        config.get("model_args", {}).pop("num_classes", None)
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def _labels_of(model: nn.Module) -> Optional[list[str]]:
    """The labels that a model was loaded with, if its classifier still has as many classes."""
    known = getattr(model, "pretrained_cfg", {}).get("label_names")
    fits = isinstance(known, (list, tuple)) and len(known) == getattr(model, "num_classes", None)
    return list(known) if fits and known else None


def name_and_options(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Give the ``dg_`` name that builds this network again, and the options of its graph.

    Raises:
        BadValue: if the model is static, or timm knows no such name.
    """
    stages = require_dynamic(model)
    stage = next(iter(stages.values()))
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture") or ""
    if not architecture.startswith("dg_"):
        architecture = f"dg_{architecture}"
    if not is_model(architecture):
        mend = (
            f'call dg_timm.models.register("{architecture}") first, and in every process that loads the folder'
            if is_model(architecture.removeprefix("dg_"))
            else "keep its state_dict() instead"
        )
        raise BadValue(
            f"can't save this {type(model).__name__}: the zoo has no {architecture!r} that timm could load it back by; "
            f"{mend}"
        )
    options: dict[str, Any] = {key: False for key in BOOL_OPTIONS if not getattr(stage, key)}
    if stage.gates:
        options["gates"] = True
    options |= {key: value for key in ("budgets", "cascade") if (value := getattr(stage, key))}
    if skipped := {name: nodes for name, of_stage in stages.items() if (nodes := of_stage.skipped_blocks())}:
        options["skipped_blocks"] = skipped
    if not all(stage.is_complete() for stage in stages.values()):
        options["topology"] = {name: stage.edges for name, stage in stages.items()}
    return architecture, options


def build_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """Build the network that a config.json describes on the meta device: it has names and shapes, and no weights."""
    options = {"in_chans": config["pretrained_cfg"]["input_size"][0], "num_classes": config["num_classes"]}
    return timm.create_model(config["architecture"], device="meta", **{**config.get("model_args", {}), **options})
