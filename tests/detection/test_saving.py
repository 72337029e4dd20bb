"""Detectors that are saved, loaded, and started from."""

import pytest
import timm
import torch
from torch import nn

import dg_timm
from dg_timm._errors import BadValue
from dg_timm.conversion.state_dict import is_identity
from dg_timm.detection.backbone import flat_name
from dg_timm.detection.detectors import DETECTORS, create_detector
from dg_timm.detection.initial_weights import is_detector, start_from
from dg_timm.detection.saving import load_detector, save_detector
from dg_timm.graph.stage import graph_stages
from tests.helpers.detection import SMALL, images_of, make_detector, save_classifier
from tests.helpers.networks import randomize_graph


@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("mobilenetv2_050", marks=pytest.mark.slow)])
def test_a_trained_static_detector_becomes_dynamic_without_changing_a_detection(backbone, pages, tmp_path):
    file = save_classifier(backbone, tmp_path)
    static = make_detector("faster_rcnn", backbone, initial_checkpoint=file, seed=3).eval()
    save_detector(static, tmp_path / "static")
    dynamic = make_detector("faster_rcnn", f"dg_{backbone}", initial_checkpoint=str(tmp_path / "static")).eval()
    assert graph_stages(dynamic)
    for one in (static, dynamic):
        one.roi_heads.score_thresh = 0.0
    images = images_of(pages.test, 2)
    with torch.inference_mode():
        for one, other in zip(static(images), dynamic(images), strict=True):
            assert len(one["boxes"]) > 5
            assert all(torch.equal(one[key], other[key]) for key in one)
    more = create_detector("faster_rcnn", f"dg_{backbone}", ["a", "b", "c"], [1, 2, 3], SMALL,
                           initial_checkpoint=str(tmp_path / "static"))  # fmt: skip
    for name, value in more.state_dict().items():  # everything is taken over but what the classes decide
        same = name in static.state_dict() and torch.equal(value, static.state_dict()[name])
        assert same or "backbone.body" in name or "box_predictor" in name
    with pytest.raises(BadValue, match="has another backbone"):
        make_detector("faster_rcnn", "dg_regnetx_002", initial_checkpoint=str(tmp_path / "static"))


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_050"])
def test_a_static_detectors_state_dict_is_the_identity_of_a_dynamic_one(backbone, pages, tmp_path):
    """Stages complete a static state dict below any parent: the detector's own, and one around it."""
    file = save_classifier(backbone, tmp_path)
    static = make_detector("retinanet", backbone, initial_checkpoint=file, seed=3).eval()
    dynamic, wrapped = (make_detector("retinanet", f"dg_{backbone}").eval() for _ in range(2))
    randomize_graph(dynamic)  # what was learned is replaced, too
    randomize_graph(wrapped)
    names = {flat_name(name): name for name in dynamic.state_dict()}
    state = {names[flat_name(name)]: value for name, value in static.state_dict().items()}
    dynamic.load_state_dict(state)
    nn.ModuleDict({"inner": wrapped}).load_state_dict({f"inner.{name}": value for name, value in state.items()})
    for one in (static, dynamic, wrapped):
        one.score_thresh = 0.0
    images = images_of(pages.test, 2)
    with torch.inference_mode():
        expected = static(images)
        assert sum(len(one["boxes"]) for one in expected) > 10
        for other in (dynamic, wrapped):
            assert is_identity(other)
            for one, found in zip(expected, other(images), strict=True):
                assert all(torch.equal(one[key], found[key]) for key in one)


def test_a_detector_that_does_not_fit_changes_nothing(tmp_path):
    save_detector(make_detector(backbone="resnet18"), tmp_path / "other")
    one = make_detector(backbone="dg_test_resnet")
    before = {name: value.clone() for name, value in one.state_dict().items()}
    with pytest.raises(BadValue, match=r"has another backbone: .*missing"):
        start_from(one, str(tmp_path / "other"))
    (tmp_path / "other" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadValue, match="missing or damaged"):
        start_from(one, str(tmp_path / "other"))
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(("content", "error"), [("{", "is not valid JSON"), ("[1]", "must hold an object, not list")])
def test_a_damaged_config_is_named(content, error, tmp_path):
    save_detector(make_detector(), tmp_path)
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    for read in (load_detector, is_detector):
        with pytest.raises(BadValue, match=f"config.json {error}"):
            read(str(tmp_path))


def test_saving_again_replaces_files_as_a_whole(tmp_path, monkeypatch):
    one = make_detector()
    save_detector(one, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("dg_timm.detection.saving.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_detector(one, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_saved_backbone_keeps_its_own_options(tmp_path):
    model = timm.create_model("dg_resnet18", num_classes=3, edge_scale=False, block_shortcut=False)
    dg_timm.save_pretrained(model, tmp_path / "backbone")
    one = make_detector("faster_rcnn", str(tmp_path / "backbone"))
    save_detector(one, tmp_path / "detector")
    assert one.config["backbone_kwargs"] == {"edge_scale": False, "block_shortcut": False}
    assert not next(iter(graph_stages(load_detector(str(tmp_path / "detector"))).values())).edge_scale


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_saved_detector_comes_back(kind, tmp_path, pages):
    one = make_detector(kind, "dg_resnet18", model_kwargs={"edge_scale": False, "block_shortcut": False}).eval()
    save_detector(one, tmp_path / "model")
    back = load_detector(str(tmp_path))
    assert back.config == one.config
    assert not next(iter(graph_stages(back).values())).edge_scale
    image = images_of(pages.test, 1)
    with torch.inference_mode():
        for key, value in one(image)[0].items():
            assert torch.equal(value, back(image)[0][key])


def test_what_is_no_detector_is_refused(tmp_path):
    with pytest.raises(BadValue, match=r"has no config.json"):
        load_detector(str(tmp_path))
    model = timm.create_model("dg_resnet18", num_classes=2)
    dg_timm.save_pretrained(model, tmp_path / "classifier")
    with pytest.raises(BadValue, match="is a dg_resnet18, not a detector"):
        load_detector(str(tmp_path / "classifier"))
    save_detector(make_detector(), tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadValue, match=r"do not fit its config.json, or are damaged"):
        load_detector(str(tmp_path / "damaged"))
