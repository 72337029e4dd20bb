"""The code on a card runs, as a reader runs it."""

import re

import huggingface_hub
import pytest
import timm

import dg_timm
from dg_timm.hub.card import Card
from tests.helpers.cards import MODELS, SMALLEST, code_blocks, run_code
from tests.helpers.publishing import converted

TITLES = ["Image classification", "The wiring of an image", "Sparse and fixed execution", "Feature maps",
          "Image embeddings", "Fine-tuning", "Transformers"]  # fmt: skip


def check(said: dict[str, str]) -> None:
    assert len(re.findall(r"\d+\.\d%", said["Image classification"])) == 5
    assert "open edges" in said["The wiring of an image"]
    assert float(re.search(r"at most (\S+)", said["Sparse and fixed execution"])[1]) < 1e-3
    assert len(said["Feature maps"].split()) >= 5
    assert "score" in said["Transformers"]


@pytest.mark.parametrize(
    "name", [n if n == "dg_regnetx_002.pycls_in1k" else pytest.param(n, marks=pytest.mark.slow) for n in SMALLEST]
)
def test_every_code_block_runs_from_the_published_repository(name, tmp_path, hub):
    done = dg_timm.push_to_hub(converted(name), "lab/net", card=Card.read(MODELS[name], name))
    assert done.changed
    text = huggingface_hub.ModelCard.load("lab/net").content
    assert list(code_blocks(text)) == TITLES
    check(run_code(text, tmp_path, {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache")}))
    tuned = timm.create_model(f"local-dir:{tmp_path / 'fine-tuned'}", pretrained=True)
    assert tuned.pretrained_cfg["label_names"] == ["cat", "dog"]
    assert huggingface_hub.ModelCard.load(tmp_path / "fine-tuned" / "README.md").data.base_model == "lab/net"


@pytest.mark.parametrize("name", dg_timm.models.BUNDLED)
def test_every_code_block_runs_from_the_folder_of_a_network_that_ships(name, tmp_path):
    folder = dg_timm.models.BUNDLED[name]
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert list(code_blocks(text)) == TITLES
    assert "PATH_OF_THIS_FOLDER" in text
    check(run_code(text.replace("PATH_OF_THIS_FOLDER", str(folder)), tmp_path))
    assert timm.create_model(f"local-dir:{tmp_path / 'fine-tuned'}", pretrained=True).num_classes == 2
