"""Every private name of another library: what it says, and what is said without it."""

import pytest
import timm
import torch
from timm.models import model_entrypoint
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from dg_timm import _compat


def test_blocks_are_found_without_their_private_file():
    found = _compat._blocks_of_mobilenetv2()
    assert found == (_compat.DepthwiseSeparableConv, _compat.InvertedResidual)
    assert [kind.__name__ for kind in found] == ["DepthwiseSeparableConv", "InvertedResidual"]


def test_transforms_are_seen():
    seen = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(_compat.is_transformed())
        return x.sum()

    watched(torch.ones(2))
    torch.func.grad(watched)(torch.ones(2))
    torch.func.vmap(watched)(torch.ones(2, 2))
    with torch.autograd.forward_ad.dual_level():
        watched(torch.ones(2))
    watched(torch.ones(2))
    assert seen == [False, True, True, True, False]


def test_unknown_transforms_count(monkeypatch):
    monkeypatch.setattr(_compat, "_functorch_active", None)
    assert _compat.is_transformed()


def test_hooks_on_saved_tensors_of_others_are_seen():
    assert _compat.may_hook_saved_tensors()
    with torch.autograd.graph.save_on_cpu():
        assert not _compat.may_hook_saved_tensors()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not _compat.may_hook_saved_tensors()
    seen = []
    checkpoint(lambda x: seen.append(_compat.may_hook_saved_tensors()) or x * 2,
               torch.ones(1, requires_grad=True), use_reentrant=False)  # fmt: skip
    assert seen == [False]


def test_without_the_private_names_nothing_is_hooked(monkeypatch):
    monkeypatch.setattr(_compat, "_hooks_enabled", None)
    assert not _compat.may_hook_saved_tensors()


def test_modes_that_watch_and_modes_without_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert (_compat.is_watched(), _compat.records_a_program()) == (False, False)
    with FlopCounterMode(display=False):
        assert (_compat.is_watched(), _compat.records_a_program()) == (True, False)
    with FakeTensorMode():
        assert (_compat.is_watched(), _compat.records_a_program()) == (True, True)


def test_unknown_modes_count_as_watching(monkeypatch):
    monkeypatch.setattr(_compat, "_dispatch_mode", None)
    assert _compat.is_watched()
    assert not _compat.records_a_program()


def test_versions_count_changes_in_place():
    x = torch.ones(2)
    before = _compat.version_of(x)
    x.add_(1)
    assert _compat.version_of(x) == before + 1
    with torch.inference_mode():
        assert _compat.version_of(torch.ones(2)) == 0


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_module_are_seen_and_removed(register):
    module = nn.Linear(2, 2)
    assert not _compat.has_hooks(module)
    getattr(module, register)(lambda *args: None)
    assert _compat.has_hooks(module)
    _compat.remove_hooks(module)
    assert not _compat.has_hooks(module)


def test_a_forward_on_the_instance_is_a_hook():
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    assert _compat.has_hooks(module)
    _compat.remove_hooks(module)
    assert not _compat.has_hooks(module)
    assert module(torch.zeros(1, 2)).shape == (1, 2)


def test_hooks_of_all_modules_are_seen():
    assert not _compat.has_global_hooks()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    try:
        assert _compat.has_global_hooks()
    finally:
        handle.remove()
    assert not _compat.has_global_hooks()


def test_hooks_move_to_another_module():
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    fired = []
    handle = source.register_forward_hook(lambda module, args, out: fired.append(module))
    _compat.move_hooks(source, target)
    target(torch.zeros(1, 2))
    assert fired == [target]
    handle.remove()  # the handle that the user holds still works
    target(torch.zeros(1, 2))
    assert fired == [target]


def test_own_parameters_and_modules_are_those_of_the_public_names():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert dict(_compat.own_modules(module)) == dict(module.named_children())
    assert dict(_compat.own_parameters(module[0])) == dict(module[0].named_parameters(recurse=False))


def test_a_config_is_the_same_without_the_private_name(tmp_path, monkeypatch):
    model = timm.create_model("resnet18", num_classes=3)
    written = []
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
        _compat.save_timm_config(model, tmp_path / folder / "config.json", model_args={"num_classes": 3})
        written.append((tmp_path / folder / "config.json").read_text(encoding="utf-8"))
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["config.json"]
        monkeypatch.setattr(_compat, "_save_config_for_hf", None)
    assert written[0] == written[1]
    assert '"model_args"' in written[0]


def test_published_weights_become_a_state_dict_by_timms_own_filter():
    taken = _compat.static_weights_filter(model_entrypoint("regnety_002"))
    weights = {"weight": torch.ones(1)}
    assert taken({"model": weights}, timm.create_model("regnety_002")) == weights


def test_without_a_filter_weights_are_taken_as_they_are():
    weights = {"weight": torch.ones(1)}
    assert _compat.static_weights_filter(test_versions_count_changes_in_place)(weights, nn.Identity()) is weights


def test_workers_end_when_told():
    loader = DataLoader(range(8), num_workers=1, persistent_workers=True)
    assert sum(len(batch) for batch in loader) == 8
    workers = list(loader._iterator._workers)
    _compat.end_loader_workers(loader)
    assert not any(worker.is_alive() for worker in workers)


def test_a_loader_that_has_not_started_has_nothing_to_end():
    _compat.end_loader_workers(DataLoader(range(2)))
    _compat.end_loader_workers(object())
