"""The Hub-layout folder: what is in it, and that it comes back."""

import json

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import dg_timm
from dg_timm import _compat
from dg_timm._errors import BadState, BadValue
from dg_timm.graph.stage import routers
from dg_timm.hub.config import write_config
from dg_timm.hub.provenance import Provenance
from tests.helpers.networks import QUICK_FAMILIES, randomize, randomize_graph
from tests.helpers.publishing import contents, converted
from tests.helpers.scripts import python


def test_a_model_without_numbers_is_not_saved(tmp_path):
    with pytest.raises(BadState, match="on the meta device has no weights to save"):
        dg_timm.save_pretrained(timm.create_model("dg_resnet18", device="meta"), tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("name", QUICK_FAMILIES)
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
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
        with pytest.raises(BadValue, match=match):
            call()
    assert not folder.exists()


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    model = timm.create_model("dg_resnet18", num_classes=2)
    with pytest.raises(BadState, match=r"README.md already; pass overwrite=True"):
        dg_timm.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    dg_timm.save_pretrained(model, tmp_path, overwrite=True)
    assert "Model card" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_failed_save_leaves_the_old_one(tmp_path):
    """It fails late: weights, configuration and card are written when the picture can't be drawn."""
    model = timm.create_model("dg_resnet18", num_classes=2)
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    before = contents(folder)
    torch.nn.init.ones_(model.fc.bias)
    with pytest.raises(ValueError, match="expected images of 3 channels, got 5"):
        dg_timm.save_pretrained(model, folder, images=torch.zeros(1, 5, 64, 64), overwrite=True)
    assert contents(folder) == before
    with pytest.raises(ValueError, match="expected images of 3 channels, got 5"):
        dg_timm.save_pretrained(model, tmp_path / "new", images=torch.zeros(1, 5, 64, 64))
    assert not (tmp_path / "new").exists()


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
    (folder / "mine.txt").write_text("mine", encoding="utf-8")
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
        ("[]", "is not a valid index of shards"),
        ("{", "is not a valid index of shards"),
    ],
)
def test_an_index_that_names_what_is_no_shard(tmp_path, index, match):
    model = timm.create_model("dg_regnetx_002", num_classes=3)
    folder = dg_timm.save_pretrained(model, tmp_path / "model", max_shard_size="3MB")
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_unknown_and_wrong_options_are_named(tmp_path):
    folder = dg_timm.save_pretrained(timm.create_model("dg_resnet18", num_classes=2), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for args, error, match in (
        ({"edge_scal": False}, TypeError, "dg_resnet18: .*'edge_scal'.*edge_scale, block_shortcut,"),
        ({"edge_scale": "no"}, TypeError, "edge_scale must be True or False, got 'no'"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "model_args": args}), encoding="utf-8")
        with pytest.raises(error, match=match):
            timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize(
    ("spoil", "options", "error", "match"),
    [
        (None, dict(label_names="ab"), TypeError, "label_names must be a list of names, got str"),
        (None, dict(label_names=["a", None]), TypeError, "label_names must be strings, got None"),
        (None, dict(max_shard_size=0), ValueError, "max_shard_size must be bytes or"),
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
    before = contents(folder)
    if spoil is not None:
        spoil(model)
    with pytest.raises(error, match=match):
        dg_timm.save_pretrained(model, folder, overwrite=True, **options)
    assert contents(folder) == before


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
    assert "wiring.png" not in dg_timm.hub.planning.planned_files(folder, "lab/net")


# --------------------------------------------------------------------------- what a card may claim


def set_all(model, **values):
    with torch.no_grad():
        for router in routers(model).values():
            for name, value in values.items():
                getattr(router, name).fill_(value)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_all(model, threshold=1.5),  # closes the chain itself
        lambda model: model.layer2.router1.threshold.data.fill_(1.5),
        lambda model: model.layer1.router0.scale.data[1:].fill_(0.1),
        lambda model: model.layer1.router0.fc.bias.data.fill_(0.1),
    ],
    ids=["thresholds", "one threshold", "scale", "bias"],
)
def test_no_card_claims_that_a_changed_graph_predicts_bit_for_bit(tmp_path, change):
    card = dg_timm.Card(converted=True)
    model = converted("dg_resnet18.a1_in1k")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        change(model)
        assert not torch.equal(model(x), before)  # the claim would be wrong
    with pytest.raises(BadValue, match=r"the graph is not the identity any more: an edge's weight, a threshold or the"):
        dg_timm.save_pretrained(model, tmp_path / "model", card=card)
    assert not (tmp_path / "model").exists()
    text = (dg_timm.save_pretrained(model, tmp_path / "model") / "README.md").read_text(encoding="utf-8")
    assert "bit for bit" not in text


def test_thresholds_that_close_nothing_are_still_the_identity(tmp_path):
    model = converted("dg_resnet18.a1_in1k")
    static = timm.create_model("resnet18")
    static.load_state_dict({key: value for key, value in model.state_dict().items() if key in static.state_dict()})
    set_all(model, threshold=0.9)
    folder = dg_timm.save_pretrained(model, tmp_path / "model", card=dg_timm.Card(converted=True))
    assert "bit for bit" in (folder / "README.md").read_text(encoding="utf-8")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(again(x), static.eval()(x))


def test_a_threshold_in_force_leaves_no_identity(tmp_path):
    model = converted("dg_resnet18.a1_in1k")
    dg_timm.set_threshold(model, 1.5)
    with pytest.raises(BadValue, match="set_threshold is in force and is not saved"):
        dg_timm.save_pretrained(model, tmp_path / "model", card=dg_timm.Card(converted=True))
    assert not dg_timm.conversion.state_dict.is_identity(model)
    assert not (tmp_path / "model").exists()


def test_a_card_says_which_graph_the_network_has(tmp_path):
    random = timm.create_model("dg_resnet18", num_classes=2, topology="ws", instance_aware=False)
    text = (dg_timm.save_pretrained(random, tmp_path / "random") / "README.md").read_text(encoding="utf-8")
    assert "complete directed" not in text
    assert "its own weights" not in text
    full = timm.create_model("dg_resnet18", num_classes=2)
    text = (dg_timm.save_pretrained(full, tmp_path / "full") / "README.md").read_text(encoding="utf-8")
    assert "complete directed" in text
    assert "gives each image its own weights" in text


# --------------------------------------------------------------------------- where weights come from


def test_provenance_is_what_the_zoo_loaded(tmp_path):
    assert timm.create_model("dg_resnet18").provenance == Provenance(from_scratch=True)
    model = converted("dg_resnet18.a1_in1k")
    assert model.provenance == Provenance(from_scratch=False)
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert again.provenance == Provenance(from_scratch=False)
    assert ModelCard.load(folder / "README.md").data.base_model is None  # a folder is no repository


def test_a_saved_network_says_nothing_of_weights_that_it_does_not_have(tmp_path):
    origin = {"tag", "license", "origin_url", "paper_ids"}
    fresh = timm.create_model("dg_resnet18.a1_in1k", num_classes=3)
    kept = json.loads((dg_timm.save_pretrained(fresh, tmp_path / "fresh") / "config.json").read_text(encoding="utf-8"))
    assert not origin & kept["pretrained_cfg"].keys()
    loaded = dg_timm.save_pretrained(converted("dg_resnet18.a1_in1k"), tmp_path / "loaded")
    kept = json.loads((loaded / "config.json").read_text(encoding="utf-8"))
    assert kept["pretrained_cfg"]["tag"] == "a1_in1k"


def test_the_configuration_without_timms_private_writer_is_the_same(tmp_path, monkeypatch):
    model = timm.create_model("dg_regnetx_002", num_classes=3).to(memory_format=torch.channels_last)
    labels = ["a", "b", "c"]
    first = write_config(model, tmp_path / "first" / "config.json", label_names=labels)
    monkeypatch.setattr(_compat, "_save_config_for_hf", None)
    second = write_config(model, tmp_path / "second" / "config.json", label_names=labels)
    assert first == second
    assert contents(tmp_path / "first") == contents(tmp_path / "second")  # no weights are left beside it


# --------------------------------------------------------------------------- names and encodings


def test_a_network_outside_the_zoo_comes_back_by_the_code_on_its_card(tmp_path):
    """In a fresh process, which knows the name only after the line that the card has for it."""
    with pytest.raises(BadValue, match=r'call dg_timm.models.register\("dg_convnext_zepto_rms"\) first'):
        dg_timm.save_pretrained(dg_timm.dynamize(timm.create_model("convnext_zepto_rms")), tmp_path / "model")
    dg_timm.models.register("dg_test_resnet")
    model = randomize_graph(randomize(timm.create_model("dg_test_resnet", num_classes=3)))
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    text = (folder / "README.md").read_text(encoding="utf-8")
    line = 'dg_timm.models.register("dg_test_resnet")\n'
    assert text.count(line) == 7  # one in each block of code
    torch.save(model(torch.ones(1, 3, 64, 64)), tmp_path / "logits.pt")
    load = f"""
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
assert torch.equal(model(torch.ones(1, 3, 64, 64)), torch.load({str(tmp_path / "logits.pt")!r}))
"""
    start = "import dg_timm, timm, torch\n"
    unknown = python("-c", start + load)
    assert "Unknown model (dg_test_resnet)" in unknown.stderr
    known = python("-c", start + line + load)
    assert known.returncode == 0, known.stderr


def test_every_text_file_is_utf_8(tmp_path):
    """Python warns where a text file is opened in the encoding of the locale."""
    script = f"""
import warnings
import timm, torch
import dg_timm
from dg_timm.hub.planning import planned_files
warnings.filterwarnings("error", category=EncodingWarning, module="dg_timm[.].*")
model = timm.create_model("dg_regnetx_002", num_classes=2)
images, folder = torch.randn(2, 3, 64, 64), {str(tmp_path / "model")!r}
folder = dg_timm.save_pretrained(model, folder, label_names=["Käse", "猫"], images=images)
again = timm.create_model(f"local-dir:{{folder}}", pretrained=True)
assert again.pretrained_cfg["label_names"] == ["Käse", "猫"]
card = planned_files(folder, "lab/net")["README.md"].decode("utf-8")
assert "Käse, 猫" in card and "wiring.png" in card
"""
    process = python("-X", "warn_default_encoding", "-c", script)
    assert process.returncode == 0, process.stderr
