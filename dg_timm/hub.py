"""Save a dynamic graph network as a folder in Hub layout, which ``timm.create_model("local-dir:...")`` reads back."""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import safetensors.torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import is_model
from timm.models._hub import save_config_for_hf
from torch import nn

from dg_timm.checkpoint import graph_stages
from dg_timm.complexity import complexity
from dg_timm.introspect import require_dynamic
from dg_timm.version import __version__

FILES = ("model.safetensors", "config.json", "README.md")
_TEMPLATE = Path(__file__).with_name("card_template.md")


def save_pretrained(
    model: nn.Module,
    folder: Union[str, os.PathLike[str]],
    *,
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Mapping[str, Any]] = None,
    dataset: Optional[str] = None,
    accuracy: Optional[float] = None,
    training: str = "",
    overwrite: bool = False,
) -> Path:
    """Write model.safetensors, config.json and README.md (the card).

    Args:
        model: a dynamic graph network of the zoo, or one that ``dynamize`` made of a model with a ``dg_`` twin there.
        folder: made if missing. Every file is written beside its place and renamed.
        label_names: one for each class, in the order of the logits.
        data_config: preprocessing of the trained network (``input_size``, ``mean``, ``std``, ``interpolation``,
            ``crop_pct``); by default the model's own.
        dataset, accuracy: what it was measured on and its top-1 in percent, for the card; both or neither.
        training: a sentence for the card on how the weights were made.
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
    if (dataset is None) != (accuracy is None):
        raise ValueError("give dataset and accuracy together: a figure on a card names what it was measured on")
    if accuracy is not None and not 0 <= accuracy <= 100:
        raise ValueError(f"accuracy must be a percentage, got {accuracy}")
    folder = Path(folder)
    existing = [name for name in FILES if (folder / name).exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{folder} holds {', '.join(existing)} already; pass overwrite=True or another folder")

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        beside = Path(scratch)
        tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        safetensors.torch.save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        config = write_config(model, beside / "config.json", label_names=label_names, data_config=data_config)
        card = _card(model, config, dataset, accuracy, training)
        card.save(beside / "README.md")
        (beside / "model.safetensors").chmod((beside / "config.json").stat().st_mode)  # safetensors makes it private
        for name in FILES:
            os.replace(beside / name, folder / name)
    return folder


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
    save_config_for_hf(
        model,
        str(file),
        model_config={"label_names": list(label_names) if label_names else None, "dg_timm": {"version": __version__}},
        model_args=model_args,
        data_config=dict(data_config or {}),
    )
    config: dict[str, Any] = json.loads(file.read_text())
    config["architecture"] = architecture or config["architecture"]
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


def _card(
    model: nn.Module, config: Mapping[str, Any], dataset: Optional[str], accuracy: Optional[float], training: str
) -> ModelCard:
    size = tuple(config["pretrained_cfg"]["input_size"])
    counts = complexity(model, size)
    results = None
    if dataset is not None and accuracy is not None:
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=re.sub(r"[^\w./-]+", "-", dataset),
                dataset_name=dataset,
                metric_type="accuracy",
                metric_value=round(accuracy, 2),
            )
        ]
    data = ModelCardData(
        license=config["pretrained_cfg"].get("license"),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "dg_timm"],
        datasets=[dataset] if dataset and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) else None,  # only names on the Hub
        metrics=["accuracy"] if results else None,
        model_name=config["architecture"],
        eval_results=results,
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        architecture=config["architecture"],
        params=f"{counts.params / 1e6:.2f}",
        multiply_adds=f"{counts.multiply_adds / 1e6:.1f}",
        input_size=" x ".join(map(str, size)),
        training=training or "Not stated.",
        dataset=dataset,
        accuracy=accuracy,
        labels=config.get("label_names"),
    )
