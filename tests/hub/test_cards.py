"""Cards: every one renders, and says only what results/ holds."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml

import dg_timm
from dg_timm._errors import BadValue
from dg_timm.hub.card import Accuracy, Card, InferenceTime
from dg_timm.hub.rendering import TEMPLATE
from tests.helpers.cards import MODELS, ROOT, SMALLEST, SOURCES
from tests.helpers.networks import ZOO
from tests.helpers.publishing import converted

# whole numbers in the sources' prose that describe an architecture: 32 groups of 4 channels, a stage of 23 blocks
IN_WORDS = {"32", "4", "23"}


def rendered(name: str, folder: Path, card: Card | None = None) -> str:
    card = card or Card.read(MODELS[name], name)
    return (dg_timm.save_pretrained(converted(name), folder, card=card) / "README.md").read_text(encoding="utf-8")


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def unfounded(text: str, name: str) -> list[str]:
    """Numbers on a card that are neither in results/ (for this model) nor part of the template, names or the input."""
    architecture = name.partition(".")[0]
    known: set[str] = set()
    for file in (ROOT / "results").glob("*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for rows in result.values() if isinstance(rows, list) for row in rows if isinstance(row, dict)]
        shared = {key: value for key, value in result.items() if not isinstance(value, list)}
        mine = [row for row in rows if row.get("model") == architecture]
        for value in [*numbers(mine), *numbers(shared)]:
            known |= {str(value), f"{value / 1e6:.2f}", f"{value / 1e6:.1f}"}
        known |= set(re.findall(r"\d[\d.]*", str(result.get("hardware", ""))))
    cfg = timm.get_pretrained_cfg(name)
    known |= {str(number) for number in (*cfg.input_size, cfg.num_classes)} | {dg_timm.__version__}
    prose = re.sub(r"(?s)```.*?```", "", text)  # code and BibTeX
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|\[timm/[^\]]*\]", "", prose)
    prose = re.sub(rf"{re.escape(architecture)}|{re.escape(architecture.removeprefix('dg_'))}(\.\w+)?", "", prose)
    prose = re.sub(r"[A-Za-z][\w]*[-.]?\d[\w.]*", "", prose)  # names: ResNet-101, float32, ReLU6
    template = TEMPLATE.read_text(encoding="utf-8")
    literal = set(re.findall(r"(?<![\w.])\d+(?![\w.%])", template)) | IN_WORDS
    return [n for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)*", prose) if n not in known | literal]


# --------------------------------------------------------------------------- sources


def test_every_model_of_the_zoo_has_one_card_with_a_real_tag():
    named = [name for file in SOURCES for name in yaml.safe_load(file.read_text(encoding="utf-8"))["models"]]
    # those with weights: the networks for CIFAR have none
    assert sorted(name.partition(".")[0] for name in named) == sorted(
        name
        for name in ZOO  # other tests register more
        if "test" not in name and timm.get_pretrained_cfg(name.removeprefix("dg_")).has_weights
    )
    assert set(named) <= set(timm.list_pretrained("dg_*"))
    assert {name.partition(".")[0] for name in SMALLEST} <= {name.partition(".")[0] for name in named}


@pytest.mark.parametrize("name", [n if n in SMALLEST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_the_card_of_an_identity_conversion(name, tmp_path, hub):
    text = rendered(name, tmp_path / "model")
    card = huggingface_hub.ModelCard(text)  # raises for front matter that is none
    cfg = timm.get_pretrained_cfg(name)
    card.validate()
    assert card.data.license == cfg.license
    assert card.data.base_model == cfg.hf_hub_id
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    assert {"timm", "transformers", "dg_timm"} <= set(card.data.tags)
    assert card.data.datasets == ["ILSVRC/imagenet-1k"]
    assert card.data.eval_results is None  # nothing of these weights was measured by us
    assert card.data.metrics is None
    assert "**These are timm's weights, converted, not trained by us:**" in text
    assert f"[{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id})" in text
    for section in ("How it was made", "Static against dynamic", "Usage", "Limits and bias", "Papers and citation"):
        assert f"\n## {section}\n" in text
    assert "ms an image" in text
    assert not unfounded(text, name)
    assert "{{" not in text
    assert "{%" not in text


@pytest.mark.parametrize(
    "figure",
    [
        dict(summary="It reaches 78.31 % top-1."),
        dict(accuracies=[Accuracy("ImageNet", 78.31)]),
        dict(made={"Speed": "1.37 times as fast"}),
        dict(times=[InferenceTime("a laptop", 8, 224, 9.99, 8.88, 0.77, 0.7, 0.8, 15)]),
    ],
)
def test_the_check_of_figures_finds_invented_ones(figure, tmp_path):
    name = "dg_resnet18.a1_in1k"
    assert unfounded(rendered(name, tmp_path / "model", Card(converted=True, **figure)), name)


@pytest.mark.parametrize("claim", ["It reaches 78 % top-1.", "It is 17 times as fast.", "Measured on 50000 images."])
def test_the_check_of_figures_reads_the_sources_prose(claim, tmp_path):
    name = "dg_resnet18.a1_in1k"
    for source in (ROOT / "results").glob("*.json"):
        (tmp_path / "results").mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / "results")
    (tmp_path / "hub_cards").mkdir()
    text = MODELS[name].read_text(encoding="utf-8").replace("summary: >-\n", f"summary: >-\n  {claim}\n")
    assert claim in text
    (tmp_path / "hub_cards" / "card.yaml").write_text(text, encoding="utf-8")
    card = Card.read(tmp_path / "hub_cards" / "card.yaml", name)
    assert unfounded(rendered(name, tmp_path / "model", card), name)


def test_converted_is_checked(tmp_path):
    model = converted("dg_resnet18.a1_in1k")
    with torch.no_grad():
        model.layer1.router0.scale[1] = 0.1
    with pytest.raises(ValueError, match="the graph is not the identity any more"):
        dg_timm.save_pretrained(model, tmp_path / "model", card=Card(converted=True))


def test_of_weights_of_unknown_origin_nothing_is_claimed(tmp_path):
    """timm does not say whether a network that it made holds its published weights."""
    model = dg_timm.dynamize(timm.create_model("resnet18", num_classes=3))
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    data = huggingface_hub.ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert (data.license, data.base_model) == (None, None)
    assert not {"tag", "origin_url", "paper_ids"} & set(
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    )


def test_a_card_of_a_trained_network(tmp_path):
    model = timm.create_model("dg_regnetx_002", num_classes=10)
    measured = Accuracy("CIFAR-10", 91.234, static=90.5, images=10_000, spread="3 seeds", hub_dataset="uoft-cs/cifar10")
    card = Card(
        license="mit",
        datasets=["uoft-cs/cifar10"],
        made={"Recipe": "cifar10", "Hardware": "two cores", "Seeds": "0, 1, 2"},
        accuracies=[measured],
    )
    folder = dg_timm.save_pretrained(model, tmp_path / "model", card=card, images=torch.randn(2, 3, 64, 64))
    text = (folder / "README.md").read_text(encoding="utf-8")
    data = huggingface_hub.ModelCard(text).data
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("uoft-cs/cifar10", "accuracy", 91.23)
    assert (data.license, data.base_model) == ("mit", None)
    assert "| top-1 (%), CIFAR-10, test, 10000 images, 3 seeds | 90.50 | 91.23 |" in text
    assert "- **Seeds:** 0, 1, 2" in text
    assert "![The edges of each stage](wiring.png)" in text
    assert "timm's weights" not in text


def test_data_from_users_cannot_break_the_front_matter(tmp_path):
    model = timm.create_model("dg_regnetx_002", num_classes=2)
    nasty = 'a: "b"\n---\nlicense: wtfpl'
    card = Card(accuracies=[Accuracy(nasty, 50.0)], made={"Recipe": nasty})
    folder = dg_timm.save_pretrained(model, tmp_path / "model", card=card, label_names=["x: [", "--- y\n## Usage\n"])
    data = huggingface_hub.ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert data.eval_results[0].dataset_name == nasty
    assert data.license is None
    assert (folder / "README.md").read_text(encoding="utf-8").count("\n## Usage\n") == 1


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("models: [dg_resnet18.x]\n", "has no card for dg_resnet18.a1_in1k"),
        ("- a\n", "must be a mapping with `models`"),
        ("models: dg_resnet18.a1_in1k\n", "must be a mapping with `models`"),
        ("models: [dg_resnet18.a1_in1k]\ncolour: red\n", "has the unknown field colour"),
        ("models: [\n", "is not valid YAML"),
        ("models: [dg_resnet18.a1_in1k]\ndatasets: ILSVRC/imagenet-1k\n", "datasets must be a list, got 'ILSVRC"),
        ("models: [dg_resnet18.a1_in1k]\nconverted: 'no'\n", "converted must be a bool, got 'no'"),
        ("models: [dg_resnet18.a1_in1k]\nmade: [a]\n", "made must be a dict"),
        ("models: [dg_resnet18.a1_in1k]\nresults: 3\n", "results must be a list of JSON files, got 3"),
        ("models: [dg_resnet18.a1_in1k]\nresults: [none.json]\n", "can't read the results .*none.json: No such file"),
        ("models: [dg_resnet18.a1_in1k]\nresults: [card.yaml]\n", "card.yaml is not valid JSON"),
        ("models: [dg_resnet18.a1_in1k]\naccuracies: [{dataset: a, value: 50}]\n", "has the unknown field accuracies"),
    ],
)
def test_a_source_that_is_not_valid(tmp_path, content, match):
    (tmp_path / "card.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(BadValue, match=match):
        Card.read(tmp_path / "card.yaml", "dg_resnet18.a1_in1k")
