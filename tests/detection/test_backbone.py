"""Backbones: what can carry a pyramid, what is frozen, and how they run."""

import pickle
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file

from dg_timm._errors import BadValue
from dg_timm.detection.backbone import create_body, freeze_backbone
from dg_timm.detection.observation import detector_statistics
from dg_timm.graph.stage import graph_stages
from dg_timm.training.loop.learner import BATCH_NORMS, set_train_mode
from tests.helpers.detection import SMALL, images_of, make_detector


def test_a_backbone_needs_no_classifier(tmp_path):
    model = timm.create_model("resnet18", num_classes=0)
    save_file(model.state_dict(), tmp_path / "headless.safetensors")
    body = create_body("dg_resnet18", initial_checkpoint=str(tmp_path / "headless.safetensors"))
    assert torch.equal(body.conv1.weight, model.conv1.weight)


def test_a_compiled_backbone_is_the_same(monkeypatch, pages):
    """Compiled beside the module, not in its place: names, copies and statistics are those of the module."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    one, image = make_detector().eval(), images_of(pages.test, 1)
    names = list(one.state_dict())
    with torch.inference_mode():
        wanted = one(image)[0]
        one.backbone.compiled = True
        copy = deepcopy(one)
        for other in (one, copy):
            assert list(other.state_dict()) == names
            assert torch.equal(other(image)[0]["boxes"], wanted["boxes"])
    assert "cost" in detector_statistics(copy, image)


def test_each_backbone_compiles_its_own_function(monkeypatch):
    """One function for all detectors of a process would share what each compiles; and it could not be pickled."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda run: made.append(run) or (lambda *args: run(*args)))
    one, other = make_detector().eval(), make_detector("fcos").eval()
    for detector in (one, other, one):
        detector.backbone.compiled = True
        detector.backbone(torch.zeros(1, 3, 64, 64))
    assert len(made) == 2
    again = pickle.loads(pickle.dumps(one.backbone))
    assert again.compiled
    again(torch.zeros(1, 3, 64, 64))
    assert len(made) == 3


def test_a_backbone_of_one_image_size_is_refused():
    with pytest.raises(BadValue, match="swin_tiny_patch4_window7_224 does not take images of any size"):
        create_body("swin_tiny_patch4_window7_224")
    assert graph_stages(create_body("dg_convnext_atto"))


def test_a_backbone_without_four_levels_is_refused():
    with pytest.raises(BadValue, match=r"vit_tiny_patch16_224 has feature maps at the strides 16.*needs 4, 8, 16, 32"):
        create_body("vit_tiny_patch16_224")
    with pytest.raises(BadValue, match="test_nothing is not a timm or dg_timm model"):
        create_body("test_nothing")
    with pytest.raises(BadValue, match="unknown detector yolo; there are faster_rcnn, retinanet, fcos"):
        make_detector("yolo")


@pytest.mark.parametrize("backbone", ["mobilenetv2_050", "dg_mobilenetv2_050", "regnetx_002", "convnext_atto"])
def test_freezing_the_first_level(backbone):
    """What learns makes the maps from stride 8 on, and nothing else."""
    one = make_detector(backbone=backbone, options=SMALL).train()
    freeze_backbone(one, 1, norms=False)
    body = one.backbone.body
    maps = dict(zip(body.feature_info.reduction(), body(torch.rand(2, 3, 64, 64)), strict=True))
    assert not maps[4].requires_grad
    for stride in (8, 16, 32):
        assert maps[stride].requires_grad


@pytest.mark.parametrize("levels", range(5))
def test_freezing_levels(levels):
    one = make_detector(backbone="dg_resnet18")
    freeze_backbone(one, levels, norms=False)
    learning = {name.split(".")[0] for name, p in one.backbone.body.named_parameters() if p.requires_grad}
    stages = [f"layer{k}" for k in range(levels + 1, 5)]
    assert learning == {*stages, *(["conv1", "bn1"] if levels == 0 else [])}


@pytest.mark.parametrize("backbone", ["dg_resnet18", "dg_mobilenetv2_050"])
def test_freezing_norms_spares_those_of_the_graph(backbone):
    """A projection's norm has no statistics yet: frozen, it would be wrong for ever."""
    one = make_detector(backbone=backbone)
    freeze_backbone(one, 0, norms=True)
    set_train_mode(one)
    body = one.backbone.body
    graph = {
        m for s in graph_stages(body).values() for name in s.added_modules() for m in s.get_submodule(name).modules()
    }
    norms = {module: module in graph for module in body.modules() if isinstance(module, BATCH_NORMS)}
    assert norms
    assert all(module.training == added for module, added in norms.items())
    assert all(p.requires_grad == added for module, added in norms.items() for p in module.parameters())
    assert any(norms.values()) == (backbone == "dg_mobilenetv2_050")
