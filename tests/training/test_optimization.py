"""Batch arithmetic, parameter groups, schedules and losses, against closed forms and timm's or torch's own."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.task.distillation import DistillationTeacher

import dg_timm
from dg_timm.graph.stage import routers
from dg_timm.training.data.loading import Batch
from dg_timm.training.loop.objective import Classification
from dg_timm.training.loop.optimization import (
    create_optimizer,
    create_schedule,
    parameter_groups,
    scaled_lr,
    split_batch,
)
from dg_timm.training.run import networks as models


@pytest.mark.parametrize(
    ("images", "processes", "micro", "expected"),
    [(1024, 16, None, (64, 1)), (1024, 8, 64, (64, 2)), (1024, 1, 256, (256, 4)), (64, 2, 100, (32, 1))],
)
def test_a_batch_is_the_same_over_any_number_of_devices(images, processes, micro, expected):
    split = split_batch(images, processes, micro)
    assert (split.micro_batch, split.accumulation) == expected
    assert split.micro_batch * split.accumulation * split.processes == images


def test_batches_that_can_not_be_shared_name_what_can():
    with pytest.raises(ValueError, match="--batch-size 100 can't be shared by 8 processes; the nearest that can is 96"):
        split_batch(100, 8)
    with pytest.raises(ValueError, match=r"--micro-batch 48 does not divide the 64 images of a process.*; use 32"):
        split_batch(128, 2, 48)
    with pytest.raises(ValueError, match="the nearest that can is 4"):
        split_batch(1, 4)


def test_learning_rates_scale_with_the_batch():
    assert scaled_lr(0.1, 1024, 256) == pytest.approx(0.4)
    assert scaled_lr(0.1, 1024, 256, "sqrt") == pytest.approx(0.2)
    assert scaled_lr(0.1, 1024, None) == 0.1


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("name", ["dg_regnetx_002", "dg_tf_efficientnet_lite0", "regnetx_002"])
def test_every_parameter_is_in_one_group_and_the_graph_in_its_own(name, layer_decay):
    model = timm.create_model(name, num_classes=10)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=layer_decay, graph_lr_scale=0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    graph = {id(p) for router in routers(model).values() for p in router.parameters()}
    for group in groups:
        inside = {id(p) in graph for p in group["params"]}
        assert inside == {group["graph"]}
        if group["graph"]:
            assert group["weight_decay"] == 0
            assert group["lr_scale"] <= 0.1 + 1e-9
        elif group["weight_decay"] == 0:
            assert all(p.ndim <= 1 for p in group["params"])
    scales = {round(group["lr_scale"], 6) for group in groups if group["graph"]}
    if graph and layer_decay is None:
        assert scales == {0.1}
    elif graph:
        assert len(scales) > 1  # the graph of an early stage learns slower, too
    assert {name for group in groups for name in group["param_names"]} == dict(model.named_parameters()).keys()


def schedule(optimizer, **changes):
    options = dict(
        sched="cosine", epochs=100, updates_per_epoch=10, warmup_epochs=5, warmup_lr=0.0, min_lr=0.0, cooldown_epochs=0,
        decay_rate=0.1, decay_epochs=None, decay_milestones=[30, 60, 90], warmup_prefix=False,
    )  # fmt: skip
    return create_schedule(optimizer, **(options | changes))


def test_the_schedule_counts_updates_and_scales_every_group():
    model = timm.create_model("dg_resnet18", num_classes=2)
    groups = parameter_groups(model, weight_decay=1e-4, graph_lr_scale=0.25)
    optimizer = create_optimizer(groups, opt="sgd", lr=0.4, momentum=0.9, options={})
    own, epochs = schedule(optimizer)
    assert epochs == 100
    for update, expected in ((0, 0.0), (25, 0.2), (50, None), (500, 0.2), (1000, 0.0)):
        expected = 0.2 * (1 + math.cos(math.pi * update / 1000)) if expected is None else expected
        own.step_update(update)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * (0.25 if group["graph"] else 1), abs=1e-12)
    optimizer = create_optimizer(groups, opt="sgd", lr=0.4, momentum=0.9, options={})
    schedule(optimizer, warmup_epochs=0)  # already before the first step
    assert {round(group["lr"], 6) for group in optimizer.param_groups} == {0.4, 0.1}
    with pytest.raises(ValueError, match="--warmup-epochs 100 leaves nothing of --epochs 100"):
        schedule(optimizer, warmup_epochs=100)
    assert schedule(optimizer, warmup_epochs=5, warmup_prefix=True, cooldown_epochs=3)[1] == 108


def test_any_timm_optimizer_or_an_error():
    model = timm.create_model("dg_regnetx_002", num_classes=2)
    groups = parameter_groups(model, weight_decay=0.01)
    lamb = create_optimizer(parameter_groups(model, weight_decay=0.01), opt="lamb", lr=1e-3, momentum=0.9, options={})
    assert type(lamb).__name__ == "Lamb"
    adamw = create_optimizer(groups, opt="adamw", lr=1e-3, momentum=0.9, options={"betas": [0.8, 0.9]})
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    for opt, options in (("adamww", {}), ("sgd", {"nonsense": 1})):
        with pytest.raises(ValueError, match=f"--opt {opt}"):
            create_optimizer(groups, opt=opt, lr=1e-3, momentum=0.9, options=options)


# --------------------------------------------------------------------------- freezing


def test_freezing():
    model = timm.create_model("dg_resnet18", num_classes=3)
    assert models.freeze(model, "backbone", new_classifier=True) == ["fc.weight", "fc.bias"]
    learning = models.freeze(model, "all-but-graph", new_classifier=False)
    assert learning
    assert all("router" in name or "projection" in name for name in learning)
    assert "fc.weight" in models.freeze(model, "all-but-graph", new_classifier=True)
    with pytest.raises(ValueError, match="--freeze all-but-graph leaves nothing to learn in this ResNet: it is static"):
        models.freeze(timm.create_model("resnet18"), "all-but-graph", new_classifier=False)


def test_frozen_norms_keep_their_statistics():
    model = timm.create_model("dg_mobilenetv2_050", num_classes=3)
    models.freeze(model, "all-but-graph", new_classifier=False)
    models.set_train_mode(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 3, 64, 64))
    moved = {
        n.rsplit(".", 1)[0] for n, b in model.named_buffers() if "running_mean" in n and not torch.equal(b, before[n])
    }
    assert moved
    assert all("projection" in name for name in moved)  # a projection learns
    models.set_train_mode(model, fixed_norms=True)
    assert not any(module.training for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))


# --------------------------------------------------------------------------- losses


def batch(n=6, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 4, 4, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return Batch(images, labels, torch.ones(n), torch.zeros(n, 2, dtype=torch.long), [], [])


def network(classes=5):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, classes))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing):
    model, own = network(), batch()
    losses = Classification(5, smoothing=smoothing)(model, own, 0)
    expected = F.cross_entropy(model(own.images), own.labels, label_smoothing=smoothing)
    assert losses.loss.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.shown["top1"].tolist() == (100.0 * (model(own.images).argmax(1) == own.labels)).tolist()


def test_mixup_is_timms_and_repeats_itself():
    from timm.loss import SoftTargetCrossEntropy

    model, own = network(), batch()
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
    objective = Classification(5, smoothing=0.1, mixup=mixup, seed=3)
    first = objective(model, own._replace(images=own.images.clone()), 7, 0, 0)
    again = objective(model, own._replace(images=own.images.clone()), 7, 0, 0)
    other = objective(model, own._replace(images=own.images.clone()), 8, 0, 0)
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.loss, other.loss)
    from dg_timm.training.data.loading import seeded

    with seeded(3, 7, 0, 0):
        images, target = mixup(own.images.clone(), own.labels)
    assert first.loss.mean().item() == pytest.approx(SoftTargetCrossEntropy()(model(images), target).item(), rel=1e-6)
    mixup.mixup_enabled = False  # after the off-epoch
    plain = objective(model, own, 7, 0, 0)
    assert torch.equal(plain.loss, Classification(5, smoothing=0.1)(model, own).loss)


def test_binary_cross_entropy_is_torchs():
    model, own = network(), batch()
    losses = Classification(5, loss="bce")(model, own)
    expected = F.binary_cross_entropy_with_logits(model(own.images), F.one_hot(own.labels, 5).float())
    assert losses.loss.mean().item() == pytest.approx(expected.item(), rel=1e-6)


def test_distillation():
    own = batch()
    teacher, student = network(), network()
    alone = Classification(5, teacher=DistillationTeacher(teacher), distill_weight=1.0, temperature=2.0)
    assert alone(student, own).loss.abs().max() < 1e-6  # the teacher itself
    with torch.no_grad():
        student[1].weight.mul_(0.5)
    p, q = (F.softmax(m(own.images) / 2, 1) for m in (teacher, student))
    expected = (p * (p.log() - q.log())).sum(1) * 4
    assert torch.allclose(alone(student, own).loss, expected, atol=1e-6)
    half = Classification(5, teacher=DistillationTeacher(teacher), distill_weight=0.5, temperature=2.0)
    mixed = 0.5 * F.cross_entropy(student(own.images), own.labels, reduction="none") + 0.5 * expected
    assert torch.allclose(half(student, own).loss, mixed, atol=1e-6)


# --------------------------------------------------------------------------- networks by name


@pytest.fixture(scope="module")
def static_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    torch.manual_seed(0)
    model = timm.create_model("regnetx_002", num_classes=7)
    models.save_model(model, folder, dg_timm.Card(), label_names=[f"class {k}" for k in range(7)], data_config={})
    return folder, model.eval()


def test_a_static_checkpoint_makes_an_identity(static_weights):
    folder, static = static_weights
    dynamic = models.create("dg_regnetx_002", initial_checkpoint=str(folder), num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(static(images), dynamic(images))
    assert models.same_classifier(dynamic, "dg_regnetx_002", str(folder), False)
    teacher = models.create_teacher("static", dynamic, "dg_regnetx_002", fresh=False)
    assert torch.equal(teacher(images), static(images))
    assert not any(p.requires_grad for p in teacher.parameters())
    again = models.create(str(folder))
    assert torch.equal(again.eval()(images), static(images))
    assert again.pretrained_cfg["label_names"][3] == "class 3"


def test_another_number_of_classes_gets_a_new_classifier(static_weights):
    folder, static = static_weights
    model = models.create("dg_regnetx_002", initial_checkpoint=str(folder / "model.safetensors"), num_classes=3)
    assert torch.equal(model.stem.conv.weight, static.stem.conv.weight)
    assert model.head.fc.weight.shape[0] == 3
    assert not models.same_classifier(model, "dg_regnetx_002", str(folder), False)
    before = model.head.fc.weight.clone()
    models.scale_classifier(model, 0.1)
    assert torch.allclose(model.head.fc.weight, 0.1 * before)
    with pytest.raises(ValueError, match="has no trained classifier for these classes"):
        models.create_teacher("static", model, "dg_regnetx_002", fresh=True)


def test_any_timm_model_takes_the_prefix():
    model = models.create("dg_convnext_atto", num_classes=4)
    assert routers(model)
    with pytest.raises(ValueError, match=r"dg_resnett50 is no timm or dg_timm model; do you mean .*dg_resnet50"):
        models.create("dg_resnett50")


def test_teachers_that_can_not_teach(static_weights):
    folder, static = static_weights
    with pytest.raises(ValueError, match="regnetx_002 is static: --distill alone"):
        models.create_teacher("static", static, "regnetx_002", fresh=False)
    student = models.create("dg_resnet18", num_classes=3)
    with pytest.raises(ValueError, match="has 7 classes, the student 3"):
        models.create_teacher(str(folder), student, "dg_resnet18", fresh=True)
    scratch = models.create("dg_regnetx_002", num_classes=7)
    with pytest.raises(ValueError, match="starts from dynamic weights"):
        models.create_teacher("static", scratch, "dg_regnetx_002", fresh=False)


def test_weights_that_are_not_there(tmp_path, static_weights):
    folder, _ = static_weights
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        models.create("dg_resnet18", initial_checkpoint=str(tmp_path / "nowhere"))
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="only safetensors are loaded"):
        models.create("dg_resnet18", initial_checkpoint=str(tmp_path / "weights.pth"))
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="it is truncated or no safetensors file"):
        models.create("dg_regnetx_002", initial_checkpoint=str(tmp_path / "cut.safetensors"))
    with pytest.raises(ValueError, match=r"dg_resnet18: .*does not fit|has no classifier fc.weight"):
        models.create("dg_resnet18", initial_checkpoint=str(folder))
    with pytest.raises(ValueError, match="both name weights"):
        models.create("dg_regnetx_002", initial_checkpoint=str(folder), pretrained=True)


def test_a_graph_is_made_again_as_its_weights_were(tmp_path):
    """Without the blocks' shortcuts the same tensors predict something else."""
    saved = timm.create_model("dg_cifar_resnet20", block_shortcut=False, topology="ws", topology_seed=3).eval()
    folder = dg_timm.save_pretrained(saved, tmp_path / "net", card=None)
    again = models.create("dg_cifar_resnet20", initial_checkpoint=str(folder)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), saved(x))
    other = models.create("dg_cifar_resnet20", initial_checkpoint=str(folder), block_shortcut=True).eval()
    assert not torch.equal(other(x), saved(x))  # who says so gets it
    dg_timm.save_pretrained(again, tmp_path / "second", card=None)
    assert torch.equal(models.create(str(tmp_path / "second")).eval()(x), saved(x))
