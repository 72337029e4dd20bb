"""Batch arithmetic, parameter groups and schedules, against closed forms and timm's own."""

import math

import pytest
import timm
import torch

from dg_timm._errors import BadValue
from dg_timm.graph.stage import routers
from dg_timm.training.loop.optimization import (
    create_optimizer,
    create_schedule,
    parameter_groups,
    scaled_lr,
    split_batch,
)


@pytest.mark.parametrize(
    ("images", "processes", "micro", "expected"),
    [(1024, 16, None, (64, 1)), (1024, 8, 64, (64, 2)), (1024, 1, 256, (256, 4)), (64, 2, 100, (32, 1))],
)
def test_a_batch_is_the_same_over_any_number_of_devices(images, processes, micro, expected):
    split = split_batch(images, processes, micro)
    assert (split.micro_batch, split.accumulation) == expected
    assert split.micro_batch * split.accumulation * split.processes == images


def test_batches_that_can_not_be_shared_name_what_can():
    with pytest.raises(BadValue, match="--batch-size 100 can't be shared by 8 processes; the nearest that can is 96"):
        split_batch(100, 8)
    with pytest.raises(BadValue, match=r"--micro-batch 48 does not divide the 64 images of a process.*; use 32"):
        split_batch(128, 2, 48)
    with pytest.raises(BadValue, match="the nearest that can is 4"):
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
    with pytest.raises(BadValue, match="--warmup-epochs 100 leaves nothing of --epochs 100"):
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
        with pytest.raises(BadValue, match=f"--opt {opt}"):
            create_optimizer(groups, opt=opt, lr=1e-3, momentum=0.9, options=options)


def test_a_schedule_that_timm_refuses_is_named():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(BadValue, match=r"--sched rsqrt: .*warmup_t"):
        schedule(optimizer, sched="rsqrt", warmup_epochs=0)
