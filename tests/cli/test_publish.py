"""publish.py, as a user runs it."""

import functools
import json
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dg_timm
from dg_timm.cli import publish as publish_module
from dg_timm.cli.publish import main
from tests.helpers.hub import WRITER
from tests.helpers.loopback_hub import Fault, StaticTimmModels
from tests.helpers.publishing import contents, small, smallest
from tests.helpers.scripts import run


@pytest.fixture
def publish(hub, tmp_path):
    """publish.py as a user runs it; timm's repositories are there, with random weights."""
    hub.repositories.others = StaticTimmModels(tmp_path)
    env = {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_ETAG_TIMEOUT": "60"}

    return functools.partial(run, "publish.py", env=env)


@pytest.mark.slow
def test_publish_a_converted_model(publish, hub):
    dry = publish("dg_regnetx_002.pycls_in1k", "lab/converted", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    for line in ("bytes  README.md", "bytes  config.json", "bytes  model.safetensors", "bytes  wiring.png"):
        assert line in dry.stdout
    assert "**These are timm's weights, converted, not trained by us:**" in dry.stdout
    assert 'timm.create_model("hf-hub:lab/converted", pretrained=True)' in dry.stdout
    assert "nothing was sent" in dry.stdout
    assert not [request for request in hub.requests if request.method not in ("GET", "HEAD")]

    done = publish("dg_regnetx_002", "lab/converted")  # the default tag is that of the card
    assert done.returncode == 0, done.stderr
    assert "published: http" in done.stdout
    again = publish("dg_regnetx_002", "lab/converted")
    assert "nothing changed: lab/converted holds this content already" in again.stdout
    assert len(hub.repositories.log("lab/converted")) == 2
    assert WRITER not in dry.stdout + done.stdout + again.stdout + dry.stderr + done.stderr + again.stderr

    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        static = timm.create_model("regnetx_002.pycls_in1k", pretrained=True).eval()(x)
        assert torch.equal(timm.create_model("hf-hub:lab/converted", pretrained=True).eval()(x), static)


def test_publish_a_folder_with_pictures(publish, hub, tmp_path):
    folder = dg_timm.save_pretrained(timm.create_model("dg_regnetx_002", num_classes=2), tmp_path / "run" / "model")
    before = contents(folder)
    for k in range(3):
        Image.fromarray(np.full((40, 40, 3), 60 * k, np.uint8)).save(tmp_path / f"{k}.png")
    done = publish(tmp_path / "run", "lab/mine", "--images", tmp_path, "--private", "--commit-message", "first")
    assert done.returncode == 0, done.stderr
    assert hub.repositories.log("lab/mine")[0] == "first"
    assert hub.repositories.info("lab/mine", WRITER)["private"]
    assert "![The edges of each stage](wiring.png)" in huggingface_hub.ModelCard.load("lab/mine").content
    with Image.open(huggingface_hub.hf_hub_download("lab/mine", "wiring.png")) as picture:
        assert picture.width > 200
    assert contents(folder) == before


def test_publish_a_network_outside_the_zoo(publish, tmp_path):
    """As train.py saves one; this process knows its name, and that of publish.py has to find out."""
    folder = dg_timm.save_pretrained(smallest(), tmp_path / "model")
    done = publish(folder, "lab/mine", "--json", "--output", tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["repo_id"], row["sent"]) == ("lab/mine", True)
    assert row["commit"] in row["url"]
    sent = contents(tmp_path / "copy")
    assert {name: len(content) for name, content in sent.items()} == row["files"]
    for name in row["files"]:
        assert Path(huggingface_hub.hf_hub_download("lab/mine", name)).read_bytes() == sent[name]
    card = huggingface_hub.ModelCard.load("lab/mine").content
    assert card.count('dg_timm.models.register("dg_test_resnet")\nmodel = timm.create_model("hf-hub:lab/mine"') == 5


@pytest.mark.parametrize("name", dg_timm.models.BUNDLED)
def test_publish_a_network_that_ships(hub, capsys, name):
    assert main([name, "lab/shipped"]) == 0
    assert "published: http" in capsys.readouterr().out
    assert sorted(huggingface_hub.list_repo_files("lab/shipped")) == sorted(contents(dg_timm.models.BUNDLED[name]))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("nowhere", "lab/x"), "nowhere is neither a folder nor a model of the zoo"),
        (("resnet18", "lab/x"), "resnet18 is neither a folder nor a model of the zoo"),
        (("dg_resnet18.none", "lab/x"), "dg_resnet18.none has no weights; there are dg_resnet18."),
        (("dg_cifar_resnet20", "lab/x"), "has no weights; there are none of this model"),
        (("dg_test_resnet", "lab/x"), "dg_test_resnet is neither a folder nor a model of the zoo"),
        (("dg_regnetx_002", "x", "--dry-run"), "'x' names no owner"),
        (("dg_regnetx_002", "lab/x", "--images", "."), "a converted network has the same wiring for every image"),
        (("dg_regnetx_002", "lab/x", "--card", "no.yaml"), "can't read the card no.yaml: No such file or directory"),
        (("dg_regnetx_002", "lab/x", "--max-shard-size", "big"), "max_shard_size must be bytes or for example"),
        ((".", "lab/x", "--card", "a.yaml"), "--card is for models of the zoo"),
        (("dg_regnetx_002", "x"), "'x' names no owner"),
        (("dg_regnetx_002", "lab/x", "--output", "."), "--output . exists already; give a new folder"),
        (("dg_regnetx_002", "../x"), "'../x' is not a repository id"),
        ((".", "lab/x"), "has no config.json and no README.md; give a folder that save_pretrained wrote"),
    ],
)
def test_bad_arguments_send_nothing(hub, tmp_path, monkeypatch, capsys, args, match):
    hub.repositories.others = StaticTimmModels(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(list(args)) == 2
    assert match in capsys.readouterr().err
    assert not [request for request in hub.requests if request.method not in ("GET", "HEAD")]


@pytest.mark.parametrize(
    ("names", "match"), [((), "holds no picture (jpg, png, webp)"), (("a.png",), "--images: can't read")]
)
def test_pictures_that_can_not_be_read(hub, tmp_path, capsys, names, match):
    folder = dg_timm.save_pretrained(small(), tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for name in names:
        (tmp_path / "pictures" / name).write_bytes(b"no picture")
    assert main([str(folder), "lab/mine", "--images", str(tmp_path / "pictures")]) == 2
    assert match in capsys.readouterr().err
    assert not hub.requests


def test_an_installed_package_has_no_cards(hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(publish_module, "CARDS", tmp_path / "hub_cards")
    assert main(["dg_regnetx_002", "lab/x", "--dry-run"]) == 2
    assert "run this in a clone of the repository, or give --card" in capsys.readouterr().err


def test_what_the_hub_refuses_is_one_line(hub, tmp_path, capsys):
    """Anything that a user can mend is; a defect keeps its traceback."""
    folder = dg_timm.save_pretrained(small(), tmp_path / "model")
    hub.faults.append(Fault("commit/main", "POST", times=-1, status=403))
    assert main([str(folder), "lab/mine"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Your token may not write to lab/mine" in error


def test_a_defect_keeps_its_traceback(tmp_path, monkeypatch):
    folder = dg_timm.save_pretrained(small(), tmp_path / "model")

    def defect(*args, **kwargs):
        raise ValueError("a defect")

    monkeypatch.setattr(publish_module, "show", defect)
    with pytest.raises(ValueError, match="a defect"):
        main([str(folder), "lab/mine", "--dry-run"])


def test_every_option_has_a_help_text_that_shows_its_default():
    shown = publish_module.make_parser().format_help().partition("options:")[2]
    options = re.split(r"\n  (?=-)", shown)[2:]  # after the heading and --help
    assert len(options) == 10
    for option in options:
        assert "default:" in " ".join(option.split()), option
