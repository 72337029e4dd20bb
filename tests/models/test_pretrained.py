"""Networks that ship with the package: complete, loaded offline, dynamic, and as good as their cards say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import dg_timm
from dg_timm.conversion.state_dict import is_identity
from dg_timm.graph.stage import graph_stages
from dg_timm.models.registry import TRAINED

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "cifar10"


def test_one_ships():
    assert "dg_cifar_resnet26.cifar10" in TRAINED


@pytest.mark.parametrize("name", TRAINED)
def test_it_loads_offline_under_its_name(name):
    model = timm.create_model(name, pretrained=True).eval()  # the tests are offline (conftest)
    architecture = name.partition(".")[0]
    default = timm.create_model(architecture, pretrained=True).eval()
    x = torch.randn(4, *model.pretrained_cfg["input_size"])
    assert torch.equal(model(x), default(x))
    assert name in timm.list_pretrained("dg_*")
    assert not is_identity(model)
    assert len(model.pretrained_cfg["label_names"]) == model.num_classes
    folder = timm.create_model(f"local-dir:{TRAINED[name]}", pretrained=True).eval()
    assert torch.equal(folder(x), model(x))


@pytest.mark.parametrize("name", TRAINED)
def test_it_closes_edges_image_by_image(name):
    model = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(16, *model.pretrained_cfg["input_size"]) * torch.linspace(0.2, 2, 16).view(-1, 1, 1, 1)
    costs = dg_timm.cost(model, x)
    assert costs.max() < 1
    assert costs.std() > 0.005  # images differ
    dense = model(x)
    dg_timm.set_execution(model, "sparse")
    assert torch.allclose(model(x), dense, atol=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_its_classifier_can_be_replaced_and_it_trains_on(name):
    model = timm.create_model(name, pretrained=True, num_classes=3).train()
    model(torch.randn(2, *model.pretrained_cfg["input_size"])).sum().backward()
    assert all(stage.router0.fc.weight.grad is not None for stage in graph_stages(model).values())


@pytest.mark.parametrize("name", TRAINED)
def test_the_folder_is_what_publish_sends(name):
    command = [sys.executable, "train_scripts/publish.py", name, "you/net", "--dry-run"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    for file in TRAINED[name].iterdir():
        assert file.name in shown.stdout
    card = ModelCard.load(TRAINED[name] / "README.md")
    assert {"config.json", "model.safetensors", "README.md", "wiring.png"} == {f.name for f in TRAINED[name].iterdir()}
    assert card.data.eval_results
    assert "top-1" in card.text
    config = json.loads((TRAINED[name] / "config.json").read_text())
    assert config["architecture"] == name.partition(".")[0]
    assert str(Path.home()) not in card.content + json.dumps(config)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="CIFAR-10 is not here")
@pytest.mark.parametrize("name", TRAINED)
def test_it_is_as_good_as_its_card_says(name):
    command = [sys.executable, "train_scripts/validate.py", name, "--data", str(DATA), "--workers", "0"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    figures = json.loads(shown.stdout.splitlines()[0])
    (claimed,) = ModelCard.load(TRAINED[name] / "README.md").data.eval_results
    assert figures["top1"] == pytest.approx(claimed.metric_value, abs=0.02)
