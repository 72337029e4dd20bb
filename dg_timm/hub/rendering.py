"""Render a model card: from one template, through huggingface_hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import model_entrypoint
from torch import nn

from dg_timm.analysis.counting import complexity
from dg_timm.graph.stage import GATE_OPTIONS, GRAPH_OPTIONS, graph_stages
from dg_timm.hub.card import Accuracy, Card
from dg_timm.hub.labeling import labeling_in
from dg_timm.hub.layout import WIRING_PNG

TEMPLATE = Path(__file__).with_name("card_template.md")
# The card of a folder has them in place of the network's address, which is not known before it is published
_PLACEHOLDER_PATH = "PATH_OF_THIS_FOLDER"
_PLACEHOLDER_NOTE = f", and put the path of this folder in place of `{_PLACEHOLDER_PATH}`"


def render_card(model: nn.Module, config: Mapping[str, Any], card: Card) -> ModelCard:
    """Render the card of a network in a folder; :func:`with_repo_id` makes it that of a repository.

    Args:
        model: a dynamic graph network.
        config: content of its config.json.
        card: what the network itself does not know.
    """
    cfg = config["pretrained_cfg"]
    architecture = config["architecture"]
    static_name = architecture.removeprefix("dg_")
    name = f"{architecture}.{cfg['tag']}" if card.converted and cfg.get("tag") else architecture
    size = tuple(cfg["input_size"])
    stages = graph_stages(model).values()
    data = ModelCardData(
        license=card.license or cfg.get("license"),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "dg_timm"],
        datasets=list(card.datasets) or None,
        metrics=sorted({_metric_type(measured) for measured in card.accuracies}) or None,
        base_model=card.base_model,
        model_name=name,
        eval_results=[_eval_result(measured) for measured in card.accuracies] or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        architecture=architecture,
        static_name=static_name,
        register=_registration(architecture),
        complete=all(stage.is_complete() for stage in stages),
        instance_aware=all(stage.instance_aware for stage in stages),
        card=card,
        folder=_PLACEHOLDER_PATH,
        note=_PLACEHOLDER_NOTE,
        dynamic=complexity(model, size),
        static=complexity(_static_on_meta(static_name, config), size),
        size=size,
        num_classes=config["num_classes"],
        labeling=labeling_in(config),
        labels=[" ".join(label.split()) for label in config.get("label_names") or ()],
        version=config["dg_timm"]["version"],
    )


def _static_on_meta(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build the static network that a dynamic one's configuration describes; it has shapes, and no weights."""
    options = {
        key: value for key, value in config.get("model_args", {}).items() if key not in (*GRAPH_OPTIONS, *GATE_OPTIONS)
    }
    options |= {"in_chans": config["pretrained_cfg"]["input_size"][0], "num_classes": config["num_classes"]}
    return timm.create_model(name, device="meta", **options)


def _registration(architecture: str) -> str:
    """The line without which a fresh process does not know a name; nothing for the names of the zoo."""
    outside = getattr(model_entrypoint(architecture), "outside_the_zoo", False)
    return f'dg_timm.models.register("{architecture}")\n' if outside else ""


def with_picture(text: str, converted: bool = False) -> str:
    """Add the picture of the wiring to a card's text, before the usage, if it shows none.

    Args:
        text: of the card.
        converted: whether the network is an identity conversion, whose wiring is that of every image.
    """
    if f"]({WIRING_PNG})" in text:
        return text
    explained = (
        "Every image has this wiring until the network is fine-tuned: the chain of the static network."
        if converted
        else "Red edges weigh more for an image than for the others shown, blue ones less."
    )
    section = (
        f"## Wiring\n\n![The edges of each stage]({WIRING_PNG})\n\n"
        f"Squares are a stage's input and output, circles its blocks, arcs its edges; the width is the weight. "
        f"{explained}"
    )
    if "\n## Usage\n" not in text:
        return f"{text.rstrip()}\n\n{section}\n"
    return text.replace("\n## Usage\n", f"\n{section}\n\n## Usage\n", 1)


def with_repo_id(text: str, repo_id: str) -> str:
    """Make the usage of a card load the network from the Hub. What a user has edited in the text stays."""
    text = text.replace(_PLACEHOLDER_NOTE, "").replace(f"local-dir:{_PLACEHOLDER_PATH}", f"hf-hub:{repo_id}")
    return text.replace(_PLACEHOLDER_PATH, repo_id)


def _metric_type(measured: Accuracy) -> str:
    """The Hub's word for a figure."""
    return "accuracy" if measured.metric == "top-1" else measured.metric


def _eval_result(measured: Accuracy) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=measured.hub_dataset or re.sub(r"[^\w./-]+", "-", measured.dataset),
        dataset_name=measured.dataset,
        dataset_split=measured.split,
        metric_type=_metric_type(measured),
        metric_name=f"{measured.metric}{' accuracy' if measured.metric == 'top-1' else ''} (%)",
        metric_value=round(measured.value, 2),
    )
