"""Networks that ship with the package: complete, loaded offline, dynamic, and as good as their cards say."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import dg_timm
from dg_timm.conversion.state_dict import is_identity
from dg_timm.graph.stage import GRAPH_OPTIONS, graph_stages
from dg_timm.models import BUNDLED
from tests.helpers.scripts import run

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("DG_TIMM_DATA", ROOT.parent / "shared" / "data"))
DATA = SHARED / "cifar10"


def test_one_ships():
    assert "dg_cifar_resnet26.cifar10" in BUNDLED


@pytest.mark.parametrize("name", BUNDLED)
def test_it_loads_offline_under_its_name(name):
    model = timm.create_model(name, pretrained=True).eval()  # the tests are offline (conftest)
    architecture = name.partition(".")[0]
    default = timm.create_model(architecture, pretrained=True).eval()
    x = torch.randn(4, *model.pretrained_cfg["input_size"])
    assert torch.equal(model(x), default(x))
    assert name in timm.list_pretrained("dg_*")
    assert not is_identity(model)
    assert len(model.pretrained_cfg["label_names"]) == model.num_classes
    folder = timm.create_model(f"local-dir:{BUNDLED[name]}", pretrained=True).eval()
    assert torch.equal(folder(x), model(x))


@pytest.mark.parametrize("name", BUNDLED)
def test_its_graph_options_are_those_that_dynamize_takes(name):
    """The names in config.json are the ones of today, and the file says no more than saving it again would."""
    config = json.loads((BUNDLED[name] / "config.json").read_text(encoding="utf-8"))
    options = set(config["model_args"]) - {"in_chans", "global_pool"}
    assert options <= set(GRAPH_OPTIONS)
    model = timm.create_model(name, pretrained=True)
    assert {key: getattr(stage, key) for stage in graph_stages(model).values() for key in options} == {
        key: config["model_args"][key] for key in options
    }
    other = timm.create_model(name, pretrained=True, block_shortcut=not config["model_args"]["block_shortcut"])
    stage = next(iter(graph_stages(other).values()))
    assert stage.block_shortcut != config["model_args"]["block_shortcut"]  # what a caller says comes first


@pytest.mark.parametrize("name", BUNDLED)
def test_it_closes_edges_image_by_image(name):
    model = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(16, *model.pretrained_cfg["input_size"]) * torch.linspace(0.2, 2, 16).view(-1, 1, 1, 1)
    costs = dg_timm.cost(model, x)
    assert costs.max() < 1
    assert costs.std() > 0.005  # images differ
    dense = model(x)
    dg_timm.set_execution(model, "sparse")
    assert torch.allclose(model(x), dense, atol=1e-4)


@pytest.mark.parametrize("name", BUNDLED)
def test_its_classifier_can_be_replaced_and_it_trains_on(name):
    model = timm.create_model(name, pretrained=True, num_classes=3).train()
    model(torch.randn(2, *model.pretrained_cfg["input_size"])).sum().backward()
    assert all(stage.router0.fc.weight.grad is not None for stage in graph_stages(model).values())


@pytest.mark.parametrize("name", BUNDLED)
def test_the_folder_is_what_publish_sends(name):
    shown = run("publish.py", name, "you/net", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    for file in BUNDLED[name].iterdir():
        assert file.name in shown.stdout
    card = ModelCard.load(BUNDLED[name] / "README.md")
    assert {"config.json", "model.safetensors", "README.md", "wiring.png"} == {f.name for f in BUNDLED[name].iterdir()}
    assert card.data.eval_results
    assert "top-1" in card.text
    config = json.loads((BUNDLED[name] / "config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == name.partition(".")[0]
    assert str(Path.home()) not in card.content + json.dumps(config)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="CIFAR-10 is not here")
@pytest.mark.parametrize("name", BUNDLED)
def test_it_is_as_good_as_its_card_says(name):
    shown = run("validate.py", name, "--data", DATA, "--workers", 0)
    assert shown.returncode == 0, shown.stderr
    figures = json.loads(shown.stdout.splitlines()[0])
    (claimed,) = ModelCard.load(BUNDLED[name] / "README.md").data.eval_results
    assert figures["top1"] == pytest.approx(claimed.metric_value, abs=0.02)
