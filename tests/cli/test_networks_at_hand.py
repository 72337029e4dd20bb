"""predict, show, convert, list, card and doctor, on pictures and networks that are at hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import dg_timm
from dg_timm._errors import BadValue
from dg_timm.cli.loading import class_names
from dg_timm.cli.pictures import read_picture
from dg_timm.training.run import networks
from dg_timm_cli import main

SHIPPED = "dg_cifar_resnet26.cifar10"


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Five pictures, two of them in a folder of the folder, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    folder, random = tmp_path / "pictures", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for k in range(5):
        place = folder / "more" if k > 2 else folder
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(place / f"{k}.jpg")
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    return folder


def predict(*words):
    return main(["predict", SHIPPED, *map(str, words), "--batch-size", "2", "--workers", "0"])


def csv_rows(name):
    with Path(name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_rows_are_what_the_network_says(pictures, execution):
    assert predict(pictures, "--output", "rows.csv", "--top-k", "2", "--execution", execution) == 0
    rows = csv_rows("rows.csv")
    assert [row["file"].rpartition("/")[2] for row in rows] == [f"{k}.jpg" for k in range(5)]
    model = timm.create_model(SHIPPED, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(Image.open(row["file"])) for row in rows])
    with torch.inference_mode():
        scores, classes = model(images).softmax(1).topk(2)
    names = model.pretrained_cfg["label_names"]
    assert [[row["class_1"], row["class_2"]] for row in rows] == [[names[k] for k in top] for top in classes.tolist()]
    assert torch.allclose(torch.tensor([float(row["score_1"]) for row in rows]), scores[:, 0], atol=1e-4)
    assert [float(row["cost"]) for row in rows] == pytest.approx(dg_timm.cost(model, images).tolist(), abs=1e-4)
    assert all(float(row["ms"]) > 0 for row in rows)


def test_every_format_has_the_same_rows(pictures, capsys):
    from pyarrow import parquet

    for name in ("rows.csv", "rows.json", "rows.parquet"):
        assert predict(pictures, "--output", name) == 0
    assert predict(pictures, "--json") == 0
    expected = [(row["file"], row["class_1"]) for row in csv_rows("rows.csv")]
    listed = json.loads(Path("rows.json").read_text(encoding="utf-8"))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for rows in (listed, printed, parquet.read_table("rows.parquet").to_pylist()):
        assert [(row["file"], row["class_1"]) for row in rows] == expected


def test_a_bad_picture_is_named_and_counted(pictures, capsys):
    (pictures / "bad.png").write_text("broken", encoding="utf-8")
    assert predict(pictures, "--output", "rows.csv") == 2
    assert "bad.png can't be read" in capsys.readouterr().err
    assert not Path("rows.csv").exists()
    assert predict(pictures, "--output", "rows.csv", "--on-bad-image", "skip") == 0
    error = capsys.readouterr().err
    assert "left out" in error
    assert "5 pictures in" in error
    assert ", 1 left out; rows.csv" in error
    assert sorted(path.name for path in pictures.parent.iterdir()) == ["pictures", "rows.csv"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "rows.txt"), "must end with .csv, .json, .parquet"),
        (("--device", "cuda:99"), "--device cuda:99 can't be used here"),
    ],
)
def test_bad_options_of_predict(pictures, words, message, capsys):
    assert predict(pictures, *words) == 2
    assert message in capsys.readouterr().err


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "grey.png")
    assert read_picture(str(tmp_path / "grey.png"), 1).getpixel((0, 0)) == 128


def test_show_draws_and_says_what_runs(pictures, capsys):
    assert main(["show", SHIPPED, str(pictures), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 5
    assert all(0 < row["cost"] < 1 and set(row["open_edges"]) == {"layer1", "layer2", "layer3"} for row in rows)
    assert Path("wiring.png").stat().st_size > 1000


def trainer_folder(folder, prefix):
    """Save what transformers' Trainer saves of a timm model: no model_args, a prefix before every tensor's name."""
    model = timm.create_model("test_resnet", num_classes=3).eval()
    folder.mkdir()
    save_file({f"{prefix}{key}": value for key, value in model.state_dict().items()}, folder / "model.safetensors")
    config = {"architecture": "test_resnet", "model_args": None, "num_classes": 3, "label_names": ["a", "b", "c"],
              "pretrained_cfg": model.pretrained_cfg}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


@pytest.mark.parametrize("prefix", ["", "timm_model."])
def test_convert_reads_what_a_trainer_saved(tmp_path, monkeypatch, capsys, prefix):
    monkeypatch.chdir(tmp_path)
    static = trainer_folder(tmp_path / "trained", prefix)
    assert main(["convert", "trained", "-o", "converted", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]
    loaded = timm.create_model("local-dir:converted", pretrained=True).eval()
    images = torch.randn(2, *static.pretrained_cfg["input_size"])
    assert torch.equal(loaded(images), static(images))
    assert list(loaded.pretrained_cfg["label_names"]) == ["a", "b", "c"]
    assert main(["convert", "trained", "-o", "converted"]) == 2
    assert "holds README.md" in capsys.readouterr().err
    assert main(["convert", "converted", "-o", "again"]) == 2
    assert "is a dynamic network" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["", "timm_model."])
def test_what_a_trainer_saved_predicts_as_it_is(tmp_path, prefix):
    static = trainer_folder(tmp_path / "trained", prefix)
    model = networks.create(str(tmp_path / "trained")).eval()
    images = torch.randn(2, *static.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(model(images), static(images))
    assert class_names(model) == ["a", "b", "c"]
    assert networks.create(str(tmp_path / "trained"), num_classes=5)(images).shape == (2, 5)
    dynamic = networks.create("dg_test_resnet", initial_checkpoint=str(tmp_path / "trained")).eval()
    with torch.no_grad():
        assert torch.equal(dynamic(images), static(images))
    assert "state_dict" not in dynamic.pretrained_cfg
    with pytest.raises(BadValue, match="drop_rate: not for a folder that transformers saved; write it anew with"):
        networks.create(str(tmp_path / "trained"), drop_rate=0.1)


def test_convert_reads_a_file_of_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "weights.pth")
    assert main(["convert", "weights.pth", "-o", "converted"]) == 2
    assert "give --arch" in capsys.readouterr().err
    assert main(["convert", "weights.pth", "--arch", "test_vit", "-o", "converted"]) == 2
    assert "is no checkpoint of test_vit" in capsys.readouterr().err
    assert not Path("converted").exists()
    assert main(["convert", "weights.pth", "--arch", "test_resnet", "-o", "converted"]) == 0
    assert "predicts the same, bit for bit" in capsys.readouterr().out


def test_list_filters(capsys):
    assert main(["list", "cifar*", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["model"] for row in rows] == [f"dg_cifar_resnet{n}" for n in (20, 26, 32, 38)]
    assert rows[1]["tags"] == ["cifar10"]
    assert rows[0]["params"] < rows[1]["params"]
    assert main(["list", "dg_cifar*", "--most-params", "0.3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["list", "nosuch*"]) == 2
    assert main(["list", "resnet1*", "--static", "--names"]) == 0
    assert "resnet18" in capsys.readouterr().out.split()


def test_card_prints_or_writes(tmp_path, capsys):
    assert main(["card", SHIPPED, "--repo-id", "me/mine"]) == 0
    assert "hf-hub:me/mine" in capsys.readouterr().out
    assert main(["card", SHIPPED, "--output", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text(encoding="utf-8").startswith("---")


def test_doctor_finds_this_environment_sound(capsys):
    assert main(["doctor", "--offline", "--json"]) == 0
    found = {row["check"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert found["torch"]["state"] == "ok"
    assert found["models"]["found"].endswith("dg_* models registered with timm")
    assert found["Hub"]["state"] == "absent"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", SHIPPED, "PICTURE", "--image-size", "-3"], "--image-size"),
        (["show", SHIPPED, "PICTURE", "--output", "w.txt"], "the picture is a PNG file, got w.txt; give a name that"),
        (["show", SHIPPED, "PICTURE", "--output", "PICTURE/w.png"], "is a file, not a folder"),
        (["predict", SHIPPED, "PICTURE", "--output", "PICTURE/rows.csv"], "is a file, not a folder"),
        (["card", SHIPPED, "--output", "pictures"], "pictures is a folder; give the name of a file"),
        (["predict", "output/trian/model", "PICTURE"], "there is no folder output/trian/model; for a model of the Hub"),
        (["card", "./nosuch"], "there is no folder ./nosuch"),
        (["list", "resnt*"], "matches resnt*; the nearest: dg_resnet"),
    ],
)
def test_a_slip_is_one_line_that_names_the_fix(pictures, capsys, words, message):
    try:
        status = main([word.replace("PICTURE", str(pictures / "0.jpg")) for word in words])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
