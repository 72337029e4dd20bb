"""Checkpoints that do not fit are refused, by name, before anything is loaded."""

import pytest
import safetensors.torch
import timm
import torch

import dg_timm
from tests.helpers.networks import randomize_graph


@pytest.fixture
def model():
    return randomize_graph(timm.create_model("dg_resnet18", num_classes=3))


def refused(model, state_dict, match, error=RuntimeError):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        model.load_state_dict(state_dict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_keys_are_named(model):
    state_dict = timm.create_model("dg_resnet18", num_classes=3).state_dict()
    del state_dict["layer2.router1.fc.weight"]
    refused(model, state_dict, r"missing 'layer2.router1.fc.weight'. Nothing was loaded")


def test_a_misspelt_key_gets_the_nearest_right_one(model):
    state_dict = timm.create_model("dg_resnet18", num_classes=3).state_dict()
    state_dict["layer2.router1.fc.wieght"] = state_dict.pop("layer2.router1.fc.weight")
    refused(model, state_dict, r"unexpected 'layer2.router1.fc.wieght' \(nearest: 'layer2.router1.fc.weight'\)")


def test_an_extra_key_gets_the_nearest_right_one(model):
    state_dict = timm.create_model("dg_resnet18", num_classes=3).state_dict()
    state_dict["layer2.router9.scale"] = torch.ones(3)
    refused(model, state_dict, r"unexpected 'layer2.router9.scale' \(nearest: 'layer2.router\d.scale'\)")


def test_a_wrong_shape_is_shown_beside_the_right_one(model):
    state_dict = timm.create_model("dg_resnet18", num_classes=5).state_dict()
    refused(model, state_dict, r"mis-shaped 'fc.weight': \(5, 512\) in the checkpoint, \(3, 512\) in the model")


def test_another_architecture_is_cut_short(model):
    state_dict = timm.create_model("dg_resnet50").state_dict()
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state_dict)
    assert "more" in str(caught.value)
    assert len(str(caught.value)) < 4000


def test_half_a_graph_is_refused_even_when_timm_adapts_the_classifier():
    """With another number of classes timm loads loosely; routers must not stay at their start unnoticed."""
    state_dict = timm.create_model("dg_resnet18").state_dict()
    del state_dict["layer3.router0.scale"]
    with pytest.raises(RuntimeError, match=r"missing 'layer3.router0.scale'"):
        timm.create_model(
            "dg_resnet18", pretrained=True, num_classes=7, pretrained_cfg_overlay=dict(state_dict=state_dict)
        )


def test_loose_loading_stays_possible(model):
    state_dict = timm.create_model("dg_resnet18", num_classes=3).state_dict()
    del state_dict["fc.weight"]
    assert model.load_state_dict(state_dict, strict=False).missing_keys == ["fc.weight"]


def test_assign_loads_a_meta_model():
    source = timm.create_model("dg_resnet18", num_classes=3)
    model = timm.create_model("dg_resnet18", num_classes=3, device="meta")
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), source.eval()(x))


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5])
def test_a_truncated_safetensors_file(keep, tmp_path, model):
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(RuntimeError, match=r"dg_resnet18 can't be read: .* truncated or damaged; fetch it again"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    overlay = dict(file=str(weights))
    with pytest.raises(RuntimeError, match="can't be read"):
        timm.create_model("dg_resnet18", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)


def test_a_renamed_pickle_is_not_executed(tmp_path, model):
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    weights = folder / "model.safetensors"
    torch.save(model.state_dict(), weights)
    with pytest.raises(RuntimeError, match="can't be read"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_a_checkpoint_saved_by_safetensors_alone_loads(tmp_path, model):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    again = timm.create_model("dg_resnet18", num_classes=3, checkpoint_path=str(path))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
