"""The source of a model card: what is known of a network beside the network itself."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from dg_timm._errors import BadValue


@dataclass(frozen=True)
class Accuracy:
    """A measured accuracy.

    Attributes:
        dataset: name of the data set, for people.
        value: accuracy of this network, in percent.
        static: that of the static network in the same experiment, in percent; None if it was not measured.
        split: split of the data set.
        images: number of images in the split.
        spread: how far repetitions differ, in words: "standard deviation 0.46 over 3 seeds", "one seed".
        hub_dataset: name of the data set on the Hub, if it is there.
        metric: what was measured: ``top-1``, or ``mAP`` of several labels.

    Raises:
        BadValue: if an accuracy is not between 0 and 100.
    """

    dataset: str
    value: float
    static: Optional[float] = None
    split: str = "test"
    images: Optional[int] = None
    spread: str = "one run"
    hub_dataset: Optional[str] = None
    metric: str = "top-1"

    def __post_init__(self) -> None:
        for value in (self.value, self.static):
            if value is not None and not 0 <= value <= 100:
                raise BadValue(f"an accuracy must be a percentage, got {value}")


@dataclass(frozen=True)
class InferenceTime:
    """A measured inference time. The static and the dynamic network ran interleaved, in the same run.

    Attributes:
        hardware: processor or GPU and number of threads, in words.
        batch_size: images a batch.
        image_size: height and width of an image, in pixels.
        static_ms: median time of the static network, in milliseconds an image.
        dynamic_ms: median time of the dynamic network, in milliseconds an image.
        ratio: median of the ratios dynamic / static of the rounds.
        low: lower quartile of these ratios.
        high: upper quartile of these ratios.
        rounds: number of rounds.
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
    """Metadata of a model card that can't be derived from the model. Every field is optional.

    Attributes:
        summary: what the network is and what it is good for; one paragraph.
        converted: the weights are those of a static network, converted and not trained since. ``save_pretrained``
            refuses a card that says so of a graph that is not the identity.
        license: identifier of the license on the Hub; by default that of the weights' configuration.
        datasets: names, on the Hub, of the data sets that the network was trained on.
        base_model: repository on the Hub that the weights come from; by default the one that they were loaded from.
        made: how the weights were made, {title: text}: recipe, command, hardware, seeds.
        accuracies: accuracies that were measured, never quoted.
        times: inference times that were measured, never quoted.
        limits: what to beware of in this network; the card adds what is true of all.
        citation: BibTeX entry of the static network's paper.
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
        """Read the card of a model from a source file (``hub_cards/*.yaml``).

        A source file has the fields above, apart from ``accuracies`` and ``times``, and two more: ``models``, the list
        of names (``dg_resnet50.a1_in1k``) that it is for, and ``results``, a list of JSON files with measurements,
        relative to the source file. Each of those has lists ``accuracies`` and ``times`` of objects with the fields of
        :class:`Accuracy` and :class:`InferenceTime`, and ``model`` in each.

        Raises:
            BadValue: if the file is not there or not valid, or is not for this model.
        """
        file = Path(file)
        source = _read_source(file)
        if model not in source.pop("models"):
            raise BadValue(f"{file} has no card for {model}; add it to its `models`")
        results = source.pop("results", [])
        _check_fields(file, source)
        if not isinstance(results, list):
            raise BadValue(f"{file}: results must be a list of JSON files, got {results!r}")
        rows: dict[str, list[Any]] = {"accuracies": [], "times": []}
        for result in results:
            measured = _read_results(file.parent / str(result))
            rows["accuracies"] += _rows(measured, "accuracies", Accuracy, model)
            rows["times"] += _rows(measured, "times", InferenceTime, model)
        return cls(accuracies=rows["accuracies"], times=rows["times"], **source)


# Types of the fields of a source file. Figures come from its `results` alone.
_SOURCE_TYPES: dict[str, type] = {
    "summary": str, "converted": bool, "license": str, "datasets": list, "base_model": str, "made": dict, "limits": str,
    "citation": str,
}  # fmt: skip


def _read_source(file: Path) -> dict[str, Any]:
    try:
        source = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadValue(f"can't read the card {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadValue(f"{file} is not valid YAML: {error}") from error
    if not isinstance(source, dict) or not isinstance(source.get("models"), list):
        raise BadValue(f"{file} must be a mapping with `models`, a list of the models that it is for")
    return source


def _check_fields(file: Path, source: Mapping[str, Any]) -> None:
    for name, value in source.items():
        if name not in _SOURCE_TYPES:
            raise BadValue(f"{file} has the unknown field {name}; it may have {', '.join(_SOURCE_TYPES)}")
        if not isinstance(value, _SOURCE_TYPES[name]):
            raise BadValue(f"{file}: {name} must be a {_SOURCE_TYPES[name].__name__}, got {value!r}")


def _read_results(file: Path) -> dict[str, Any]:
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadValue(f"can't read the results {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadValue(f"{file} is not valid JSON: {error}") from error
    if not isinstance(measured, dict):
        raise BadValue(f"{file} must hold an object with the lists accuracies and times")
    return measured


def _rows(measured: Mapping[str, Any], key: str, row_type: Any, model: str) -> list[Any]:
    """Make the rows of a results file that are of this model, with what the file says once for all rows."""
    fields = {f.name for f in dataclasses.fields(row_type)}
    shared = {name: value for name, value in measured.items() if name in fields}
    mine = [row for row in measured.get(key, ()) if row.get("model") in (model, model.partition(".")[0])]
    return [row_type(**shared, **{name: value for name, value in row.items() if name in fields}) for row in mine]
