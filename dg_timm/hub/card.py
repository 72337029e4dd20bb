"""Model cards: what is known of a network, from one source, rendered through huggingface_hub from one template."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from dg_timm.analysis.counting import complexity
from dg_timm.graph.stage import GRAPH_OPTIONS

TEMPLATE = Path(__file__).with_name("card_template.md")
PICTURE = "wiring.png"
# stand in the card of a folder until it is known where on the Hub it will lie
_FOLDER = "PATH_OF_THIS_FOLDER"
_NOTE = f", and put the path of this folder in place of `{_FOLDER}`"


@dataclass(frozen=True)
class Accuracy:
    """A measured top-1 accuracy.

    Attributes:
        dataset: its readable name.
        value: of this network, percent.
        static: of the static network in the same experiment, percent.
        split: of the data set.
        images: how many it was measured on.
        spread: in words, for example "standard deviation 0.46 over 3 seeds" or "one seed".
        hub_dataset: the data set's name on the Hub, if it has one.
    """

    dataset: str
    value: float
    static: Optional[float] = None
    split: str = "test"
    images: Optional[int] = None
    spread: str = "one run"
    hub_dataset: Optional[str] = None

    def __post_init__(self) -> None:
        for value in (self.value, self.static):
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"an accuracy must be a percentage, got {value}")


@dataclass(frozen=True)
class InferenceTime:
    """A measured time of inference, static and dynamic interleaved in the same run; milliseconds an image, medians.

    Attributes:
        hardware: and threads, in words.
        ratio: median of the dynamic / static ratios of the rounds, with ``low`` and ``high`` its quartiles.
        rounds: how many.
    """

    hardware: str
    batch_size: int
    image_size: int
    static_ms: float
    dynamic_ms: float
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Card:
    """What a card says that the network itself does not know. All of it may be left out.

    Attributes:
        summary: what the network is and what it is good for; a paragraph.
        converted: the weights are a static network's, converted and not trained since.
        license: identifier on the Hub; by default that of the configuration that the weights come from.
        datasets: what it was trained on, as names on the Hub.
        base_model: repository on the Hub that the weights come from; by default the one that they were loaded from.
        made: how the weights were made, in rows: recipe, command, hardware, seeds, ...
        accuracies, times: measured, never quoted.
        limits: what to beware of in this network, beside what is true of all.
        citation: BibTeX of the static network's paper.
    """

    summary: str = ""
    converted: bool = False
    license: Optional[str] = None
    datasets: Sequence[str] = ()
    base_model: Optional[str] = None
    made: Mapping[str, str] = field(default_factory=dict)
    accuracies: Sequence[Accuracy] = ()
    times: Sequence[InferenceTime] = ()
    limits: str = ""
    citation: str = ""

    @classmethod
    def read(cls, file: Union[str, "os.PathLike[str]"], model: str) -> "Card":
        """The card of a model from a source file (``hub_cards/*.yaml``).

        Such a file has the fields above, besides ``models``, the list of names (``dg_resnet50.a1_in1k``) that it is
        for, and ``results``, a list of JSON files with measurements, relative to the file: objects with lists
        ``accuracies`` and ``times`` of rows like the classes above, and ``model`` in each.

        Raises:
            ValueError: if the file is not for this model, or holds something else.
        """
        file = Path(file)
        try:
            source = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no YAML: {error}") from error
        if not isinstance(source, dict) or not isinstance(source.get("models"), list):
            raise ValueError(f"{file} must be a mapping with `models`, a list of the models that it is for")
        if model not in source.pop("models"):
            raise ValueError(f"{file} has no card for {model}; add it to its `models`")
        results = source.pop("results", [])
        for name, value in source.items():
            if name not in _SOURCE_TYPES:
                raise ValueError(f"{file} has the unknown field {name}; it may have {', '.join(_SOURCE_TYPES)}")
            if not isinstance(value, _SOURCE_TYPES[name]):
                raise ValueError(f"{file}: {name} must be a {_SOURCE_TYPES[name].__name__}, got {value!r}")
        if not isinstance(results, list):
            raise ValueError(f"{file}: results must be a list of JSON files, got {results!r}")
        rows: dict[str, list[Any]] = {"accuracies": [], "times": []}
        for result in results:
            measured = json.loads((file.parent / result).read_text(encoding="utf-8"))
            rows["accuracies"] += _rows(measured, "accuracies", Accuracy, model)
            rows["times"] += _rows(measured, "times", InferenceTime, model)
        return cls(accuracies=rows["accuracies"], times=rows["times"], **source)


# of the fields of a source file; figures come from its `results` alone
_SOURCE_TYPES: dict[str, type] = {
    "summary": str, "converted": bool, "license": str, "datasets": list, "base_model": str, "made": dict, "limits": str,
    "citation": str,
}  # fmt: skip


def _rows(measured: Mapping[str, Any], key: str, row_type: Any, model: str) -> list[Any]:
    """Rows of a results file that are of this model, with what the file says once for all of them."""
    fields = {f.name for f in dataclasses.fields(row_type)}
    shared = {name: value for name, value in measured.items() if name in fields}
    mine = [row for row in measured.get(key, ()) if row.get("model") in (model, model.partition(".")[0])]
    return [row_type(**shared, **{name: value for name, value in row.items() if name in fields}) for row in mine]


def render(model: nn.Module, config: Mapping[str, Any], card: Card) -> ModelCard:
    """The card of a network that lies in a folder; :func:`with_address` makes it that of a repository.

    Args:
        model: a dynamic graph network.
        config: content of its config.json.
    """
    cfg = config["pretrained_cfg"]
    architecture = config["architecture"]
    name = f"{architecture}.{cfg['tag']}" if card.converted and cfg.get("tag") else architecture
    size = tuple(cfg["input_size"])
    options = {k: v for k, v in config.get("model_args", {}).items() if k not in GRAPH_OPTIONS}
    static_name = architecture.removeprefix("dg_")
    options |= {"in_chans": size[0], "num_classes": config["num_classes"]}
    static = timm.create_model(static_name, device="meta", **options)
    data = ModelCardData(
        license=card.license or cfg.get("license"),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "dg_timm"],
        datasets=list(card.datasets) or None,
        metrics=["accuracy"] if card.accuracies else None,
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
        card=card,
        folder=_FOLDER,
        note=_NOTE,
        dynamic=complexity(model, size),
        static=complexity(static, size),
        size=size,
        num_classes=config["num_classes"],
        labels=[" ".join(label.split()) for label in config.get("label_names") or ()],
        version=config["dg_timm"]["version"],
    )


def with_picture(text: str, converted: bool = False) -> str:
    """A card's text with the picture of the wiring, before its usage, if it has none."""
    if f"]({PICTURE})" in text:
        return text
    explained = (
        "Every image has this wiring until the network is fine-tuned: the chain of the static network."
        if converted
        else "Red edges weigh more for an image than for the others shown, blue ones less."
    )
    section = (
        f"## Topology\n\n![The edges of each stage]({PICTURE})\n\n"
        f"Squares are a stage's input and output, circles its blocks, arcs its edges; the width is the weight. "
        f"{explained}"
    )
    if "\n## Usage\n" not in text:
        return f"{text.rstrip()}\n\n{section}\n"
    return text.replace("\n## Usage\n", f"\n{section}\n\n## Usage\n", 1)


def with_address(text: str, repo_id: str) -> str:
    """A card's text in which the usage loads the network from the Hub; what a user has edited in it stays."""
    return text.replace(_NOTE, "").replace(f"local-dir:{_FOLDER}", f"hf-hub:{repo_id}").replace(_FOLDER, repo_id)


def _eval_result(measured: Accuracy) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=measured.hub_dataset or re.sub(r"[^\w./-]+", "-", measured.dataset),
        dataset_name=measured.dataset,
        dataset_split=measured.split,
        metric_type="accuracy",
        metric_name="top-1 accuracy (%)",
        metric_value=round(measured.value, 2),
    )
