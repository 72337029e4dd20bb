"""Networks by name, from any weights; teachers, and what is frozen."""

import pytest
import timm
import torch

import dg_timm
from dg_timm._errors import BadValue
from dg_timm.graph.stage import routers
from dg_timm.training.loop.learner import set_train_mode
from dg_timm.training.run import fine_tuning, networks


@pytest.fixture(scope="module")
def static_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    torch.manual_seed(0)
    model = timm.create_model("regnetx_002", num_classes=7)
    fine_tuning.save_model(model, folder, dg_timm.Card(), label_names=[f"class {k}" for k in range(7)], data_config={})
    return folder, model.eval()


def test_a_static_checkpoint_makes_an_identity(static_weights):
    folder, static = static_weights
    dynamic = networks.create("dg_regnetx_002", initial_checkpoint=str(folder), num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(static(images), dynamic(images))
    assert networks.classifier_was_loaded(dynamic, "dg_regnetx_002", str(folder), False)
    teacher = fine_tuning.create_teacher("static", dynamic, "dg_regnetx_002", fresh=False)
    assert torch.equal(teacher(images), static(images))
    assert not any(p.requires_grad for p in teacher.parameters())
    again = networks.create(str(folder))
    assert torch.equal(again.eval()(images), static(images))
    assert again.pretrained_cfg["label_names"][3] == "class 3"


def test_another_number_of_classes_gets_a_new_classifier(static_weights):
    folder, static = static_weights
    model = networks.create("dg_regnetx_002", initial_checkpoint=str(folder / "model.safetensors"), num_classes=3)
    assert torch.equal(model.stem.conv.weight, static.stem.conv.weight)
    assert model.head.fc.weight.shape[0] == 3
    assert not networks.classifier_was_loaded(model, "dg_regnetx_002", str(folder), False)
    before = model.head.fc.weight.clone()
    fine_tuning.scale_classifier(model, 0.1)
    assert torch.allclose(model.head.fc.weight, 0.1 * before)
    with pytest.raises(BadValue, match="has no trained classifier for these classes"):
        fine_tuning.create_teacher("static", model, "dg_regnetx_002", fresh=True)


def test_any_timm_model_takes_the_prefix():
    model = networks.create("dg_convnext_atto", num_classes=4)
    assert routers(model)
    with pytest.raises(BadValue, match=r"dg_resnett50 is not a timm or dg_timm model; do you mean .*dg_resnet50"):
        networks.create("dg_resnett50")


def test_teachers_that_can_not_teach(static_weights):
    folder, static = static_weights
    with pytest.raises(BadValue, match="regnetx_002 is static: --distill alone"):
        fine_tuning.create_teacher("static", static, "regnetx_002", fresh=False)
    student = networks.create("dg_resnet18", num_classes=3)
    with pytest.raises(BadValue, match="has 7 classes, the student 3"):
        fine_tuning.create_teacher(str(folder), student, "dg_resnet18", fresh=True)
    scratch = networks.create("dg_regnetx_002", num_classes=7)
    with pytest.raises(BadValue, match="starts from dynamic weights"):
        fine_tuning.create_teacher("static", scratch, "dg_regnetx_002", fresh=False)


def test_weights_that_are_not_there(tmp_path, static_weights):
    folder, _ = static_weights
    with pytest.raises(BadValue, match=r"there is no .*nowhere"):
        networks.create("dg_resnet18", initial_checkpoint=str(tmp_path / "nowhere"))
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(BadValue, match="only safetensors are loaded"):
        networks.create("dg_resnet18", initial_checkpoint=str(tmp_path / "weights.pth"))
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadValue, match="it is truncated or not a safetensors file"):
        networks.create("dg_regnetx_002", initial_checkpoint=str(tmp_path / "cut.safetensors"))
    with pytest.raises(BadValue, match=r"dg_resnet18: .*does not fit|has no classifier fc.weight"):
        networks.create("dg_resnet18", initial_checkpoint=str(folder))
    with pytest.raises(BadValue, match="both name weights"):
        networks.create("dg_regnetx_002", initial_checkpoint=str(folder), pretrained=True)


def test_a_graph_is_made_again_as_its_weights_were(tmp_path):
    """Without the blocks' shortcuts the same tensors predict something else."""
    saved = timm.create_model("dg_cifar_resnet20", block_shortcut=False, topology="ws", topology_seed=3).eval()
    folder = dg_timm.save_pretrained(saved, tmp_path / "net", card=None)
    again = networks.create("dg_cifar_resnet20", initial_checkpoint=str(folder)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), saved(x))
    other = networks.create("dg_cifar_resnet20", initial_checkpoint=str(folder), block_shortcut=True).eval()
    assert not torch.equal(other(x), saved(x))  # who says so gets it
    dg_timm.save_pretrained(again, tmp_path / "second", card=None)
    assert torch.equal(networks.create(str(tmp_path / "second")).eval()(x), saved(x))


def test_freezing():
    model = timm.create_model("dg_resnet18", num_classes=3)
    assert fine_tuning.freeze(model, "backbone", new_classifier=True) == ["fc.weight", "fc.bias"]
    learning = fine_tuning.freeze(model, "all-but-graph", new_classifier=False)
    assert learning
    assert all("router" in name or "projection" in name for name in learning)
    assert "fc.weight" in fine_tuning.freeze(model, "all-but-graph", new_classifier=True)
    with pytest.raises(BadValue, match="--freeze all-but-graph leaves nothing to learn in this ResNet: it is static"):
        fine_tuning.freeze(timm.create_model("resnet18"), "all-but-graph", new_classifier=False)


def test_frozen_norms_keep_their_statistics():
    model = timm.create_model("dg_mobilenetv2_050", num_classes=3)
    fine_tuning.freeze(model, "all-but-graph", new_classifier=False)
    set_train_mode(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 3, 64, 64))
    moved = {
        n.rsplit(".", 1)[0] for n, b in model.named_buffers() if "running_mean" in n and not torch.equal(b, before[n])
    }
    assert moved
    assert all("projection" in name for name in moved)  # a projection learns
    set_train_mode(model, fixed_norms=True)
    assert not any(module.training for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
