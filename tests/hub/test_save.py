"""The Hub-layout folder: what is in it, and that it comes back."""

import json

import pytest
import timm
import torch

import dg_timm
from tests.helpers.networks import FAMILIES, randomize, randomize_graph


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name, tmp_path):
    model = randomize_graph(randomize(timm.create_model(name, num_classes=3))).to(memory_format=torch.channels_last)
    data_config = dict(
        input_size=(3, 48, 48), mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5], interpolation="bilinear", crop_pct=1.0
    )
    labels = ["cat", "dog", "left: a 'quoted' one"]
    folder = dg_timm.save_pretrained(model, tmp_path / "a" / "model", label_names=labels, data_config=data_config)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(again(x), model.to(memory_format=torch.contiguous_format)(x))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    resolved = timm.data.resolve_model_data_config(again)
    assert {key: resolved[key] for key in data_config} == data_config
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == name
    assert config["label_names"] == labels
    assert "num_classes" not in config.get("model_args", {})
    assert config["dg_timm"] == {"version": dg_timm.__version__}


def test_a_converted_model_is_saved_under_its_twin(tmp_path):
    model = randomize_graph(dg_timm.dynamize(randomize(timm.create_model("resnet18", num_classes=3))))
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_refuses_before_it_writes(tmp_path):
    folder = tmp_path / "model"
    model = timm.create_model("dg_resnet18", num_classes=2)
    for call, match in (
        (lambda: dg_timm.save_pretrained(timm.create_model("resnet18"), folder), "is a static network"),
        (
            lambda: dg_timm.save_pretrained(dg_timm.dynamize(timm.create_model("convnext_femto")), folder),
            "the zoo has no",
        ),
        (lambda: dg_timm.save_pretrained(model, folder, label_names=["one"]), "1 label_names for a model of 2 classes"),
        (lambda: dg_timm.Accuracy("digits", 101.0), "an accuracy must be a percentage, got 101.0"),
        (lambda: dg_timm.save_pretrained(model, folder, max_shard_size="large"), "large"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert not folder.exists()


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model = timm.create_model("dg_resnet18", num_classes=2)
    with pytest.raises(FileExistsError, match=r"README.md already; pass overwrite=True"):
        dg_timm.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    dg_timm.save_pretrained(model, tmp_path, overwrite=True)
    assert "Model card" in (tmp_path / "README.md").read_text()


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    model = timm.create_model("dg_resnet18", num_classes=2)
    dg_timm.save_pretrained(model, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    monkeypatch.setattr(dg_timm.hub.save, "render", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    torch.nn.init.ones_(model.fc.bias)
    with pytest.raises(OSError, match="disk full"):
        dg_timm.save_pretrained(model, tmp_path / "model", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


def test_shards_come_back_and_leave_with_the_next_save(tmp_path):
    model = randomize_graph(randomize(timm.create_model("dg_regnetx_002", num_classes=3)))
    folder = dg_timm.save_pretrained(model, tmp_path / "model", max_shard_size="3MB", images=torch.randn(2, 3, 48, 48))
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert (folder / "wiring.png").stat().st_size > 10_000
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.pretrained_cfg["source"] == "local-dir"
    assert "state_dict" not in again.pretrained_cfg
    (folder / "mine.txt").write_text("mine")
    dg_timm.save_pretrained(model, folder, overwrite=True)
    left = [
        "README.md",
        "config.json",
        "mine.txt",
        "model.safetensors",
        "wiring.png",
    ]  # the picture is not shown any more
    assert sorted(p.name for p in folder.iterdir()) == left


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ('{"weight_map": {"a": "../../elsewhere.safetensors"}}', "must be a .safetensors file beside its index"),
        ('{"weight_map": {"a": "model-00009-of-00009.safetensors"}}', "which is not there; copy the whole folder"),
        ("[]", "is no index of shards"),
        ("{", "is no index of shards"),
    ],
)
def test_an_index_that_names_what_is_no_shard(tmp_path, index, match):
    model = timm.create_model("dg_regnetx_002", num_classes=3)
    folder = dg_timm.save_pretrained(model, tmp_path / "model", max_shard_size="3MB")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=match):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_unknown_and_wrong_options_are_named(tmp_path):
    folder = dg_timm.save_pretrained(timm.create_model("dg_resnet18", num_classes=2), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for args, error, match in (
        ({"edge_scal": False}, TypeError, "dg_resnet18: .*'edge_scal'.*edge_scale, block_shortcut,"),
        ({"edge_scale": "no"}, TypeError, "edge_scale must be True or False, got 'no'"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "model_args": args}))
        with pytest.raises(error, match=match):
            timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize(
    ("spoil", "options", "error", "match"),
    [
        (None, dict(label_names="ab"), TypeError, "label_names must be a list of names, got str"),
        (None, dict(label_names=["a", None]), TypeError, "label_names must be strings, got None"),
        (None, dict(max_shard_size=0), ValueError, "max_shard_size is bytes or"),
        (
            lambda m: setattr(m, "fc", torch.nn.Linear(m.num_features, 7)),
            {},
            ValueError,
            "could not load this model back",
        ),
        (lambda m: dg_timm.set_threshold(m, 0.6), {}, ValueError, "set_threshold is in force and is not saved"),
        (lambda m: m.reset_classifier(0), {}, ValueError, "has no classifier"),
    ],
)
def test_what_can_not_be_saved_leaves_an_earlier_save(tmp_path, spoil, options, error, match):
    model = timm.create_model("dg_resnet18", num_classes=2)
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    if spoil is not None:
        spoil(model)
    with pytest.raises(error, match=match):
        dg_timm.save_pretrained(model, folder, overwrite=True, **options)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_wrapped_networks_are_named(tmp_path):
    model = timm.create_model("dg_resnet18", num_classes=2)
    with pytest.raises(ValueError, match=r"save what is inside: model._orig_mod"):
        dg_timm.save_pretrained(torch.compile(model), tmp_path / "model")
    with pytest.raises(ValueError, match=r"save what is inside: model.module"):
        dg_timm.save_pretrained(timm.utils.ModelEmaV3(model), tmp_path / "model")


def test_a_picture_of_the_user_stays(tmp_path):
    model = timm.create_model("dg_resnet18", num_classes=2)
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    (folder / "wiring.png").write_bytes(b"mine")
    dg_timm.save_pretrained(model, folder, overwrite=True)
    assert (folder / "wiring.png").read_bytes() == b"mine"
    assert "wiring.png" not in dg_timm.hub.push.planned_files(folder, "lab/net")
