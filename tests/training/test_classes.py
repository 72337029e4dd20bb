"""The classes of a network and of the data are matched by name where both have names."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dg_timm
from dg_timm._errors import BadValue
from dg_timm.cli import train, validate
from dg_timm.training.data.sources import load_splits
from dg_timm.training.run.classes import match_classes, names_to_train

TINY = ["--workers", "0", "--image-size", "32"]


@pytest.fixture
def places(tmp_path):
    """Sixteen images of the second and third class of a network that always finds the third."""
    for k, name in ((1, "bee"), (2, "cow")):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.full((32, 32, 3), 60 * k, np.uint8)).save(tmp_path / "val" / name / f"{i}.png")
    model = timm.create_model("dg_cifar_resnet20", num_classes=3)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data.copy_(torch.tensor([0.0, 0.5, 1.0]))
    dg_timm.save_pretrained(model, tmp_path / "model", label_names=["ant", "bee", "cow"])
    return tmp_path


def command(monkeypatch, capsys, script, *words):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
    status = script.main()
    return status, capsys.readouterr()


@pytest.mark.parametrize("more", [[], ["--num-classes", 3]])
def test_validation_on_some_of_the_classes(places, monkeypatch, capsys, more):
    status, printed = command(monkeypatch, capsys, validate, places / "model", "--data", places, *TINY, *more)
    assert status == 0, printed.err
    row = json.loads(printed.out)
    assert (row["top1"], row["images"]) == (50.0, 16)  # val/ alone is evaluated as a whole
    assert "16 images to evaluate on (the evaluation split of" in printed.err


def test_a_class_that_the_network_does_not_have_is_named(places, monkeypatch, capsys):
    (places / "val" / "bee").rename(places / "val" / "wasp")
    status, printed = command(monkeypatch, capsys, validate, places / "model", "--data", places, *TINY)
    assert status == 2
    assert "['wasp'] are none of its classes; give the network's names" in printed.err
    (places / "names.txt").write_text("cow\nbee\n", encoding="utf-8")
    status, printed = command(monkeypatch, capsys, validate, places / "model", "--data", places, *TINY, "--label-names",
                              places / "names.txt")  # fmt: skip
    assert json.loads(printed.out)["top1"] == 50.0


def test_synsets_are_imagenets(places):
    for name, synset in (("bee", "n02206856"), ("cow", "n01443537")):
        (places / "val" / name).rename(places / "val" / synset)
    splits = load_splits(str(places), only_evaluate=True)
    model = timm.create_model("test_resnet")
    names = match_classes("net", model, splits, "data", None)
    assert (len(names), names.index("n02206856")) == (1000, 309)  # as in torchvision's list of ImageNet classes
    with pytest.raises(BadValue, match=r"net has 7 classes, data has 2; .*--num-classes 7"):
        match_classes("net", timm.create_model("test_resnet", num_classes=7), splits, "data", None)


def test_a_network_keeps_the_order_of_its_classes(places):
    model = timm.create_model(f"local-dir:{places / 'model'}", pretrained=True)
    lines = []
    assert names_to_train(model, ["cow", "bee", "ant"], lines.append) == ["ant", "bee", "cow"]
    assert lines == []
    assert names_to_train(model, ["x", "y", "z"], lines.append) == ["x", "y", "z"]
    assert lines == ["the network's classes ['ant', 'bee', 'cow'] are trained as ['x', 'y', 'z'] from now on"]


def test_a_summary_of_the_data_is_printed_and_drawn(places, monkeypatch, capsys, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    picture = output / "new" / "data.png"
    words = ["--model", "test_resnet", *TINY, "--data", places, "--output", output / "run"]
    status, printed = command(monkeypatch, capsys, train, *words, "--data-summary", picture)
    assert status == 0, printed.err
    assert printed.out.startswith(f"data {places}: 12 images to train on, 4 images to evaluate on (25 % of {places}")
    assert "2 classes (bee, cow)" in printed.out
    with Image.open(picture) as drawn:
        assert drawn.size == (640, 564)  # three rows of four
    assert not (output / "run").exists()
    status, printed = command(monkeypatch, capsys, train, *words, "--data-summary", "/dev/null/x.png")
    assert status == 2
    assert "/dev/null/x.png can't be written: /dev/null is a file, not a folder" in printed.err
