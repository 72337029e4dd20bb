"""A static checkpoint of a parent loads into the same parent over a dynamic network, as the identity."""

import warnings
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from dg_timm._errors import UserError
from dg_timm.conversion.state_dict import is_identity
from dg_timm.graph.stage import routers
from tests.helpers.imports import quietly_import
from tests.helpers.networks import randomize, randomize_graph


class Module(nn.Module):
    """The shape of a LightningModule: the network is an attribute, beside others with weights."""

    def __init__(self, name):
        super().__init__()
        self.net = timm.create_model(name, num_classes=3)
        self.auxiliary = nn.Linear(3, 2)

    def forward(self, x):
        return self.auxiliary(self.net(x))


def unet(name):
    smp = quietly_import("segmentation_models_pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return smp.Unet(encoder_name=f"tu-{name}", encoder_weights=None, classes=3)


PARENTS = {
    "smp.Unet": unet,
    "DataParallel": lambda name: nn.DataParallel(timm.create_model(name, num_classes=3)),
    "LightningModule": Module,
    "DataParallel of a LightningModule": lambda name: nn.DataParallel(Module(name)),
}
NAMES = ["resnet18", "regnety_002", "mobilenetv2_050"]


def static_and_other(parent, name):
    """A parent over a static network, and the same one over a dynamic network that is no identity."""
    static = randomize(PARENTS[parent](name))
    dynamic = randomize_graph(randomize(PARENTS[parent](f"dg_{name}")))
    assert not is_identity(dynamic)
    return static.eval(), dynamic.eval()


def outputs(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_static_checkpoint_is_the_identity_below_a_parent(parent, name, strict):
    static, dynamic = static_and_other(parent, name)
    report = dynamic.load_state_dict(static.state_dict(), strict=strict)
    assert report.missing_keys == report.unexpected_keys == []
    assert is_identity(dynamic)
    assert torch.equal(outputs(dynamic), outputs(static))


@pytest.mark.parametrize("parent", PARENTS)
def test_a_dynamic_checkpoint_stays_what_it_is_below_a_parent(parent):
    _, trained = static_and_other(parent, "resnet18")
    _, other = static_and_other(parent, "resnet18")
    other.load_state_dict(trained.state_dict())
    assert torch.equal(outputs(other), outputs(trained))


@pytest.mark.parametrize("parent", PARENTS)
def test_a_part_of_a_checkpoint_never_touches_routers(parent):
    """A head, say: what the checkpoint does not hold stays, and is reported as missing."""
    static, trained = static_and_other(parent, "resnet18")
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    part = OrderedDict((key, value) for key, value in static.state_dict().items() if "layer2" not in key)
    report = trained.load_state_dict(part, strict=False)
    own = {key for key in before if ".router" in key and "layer2" in key}
    assert own <= set(report.missing_keys)
    assert all(torch.equal(trained.state_dict()[key], before[key]) for key in own)


@pytest.mark.parametrize("parent", PARENTS)
def test_a_checkpoint_of_another_network_changes_nothing_below_a_parent(parent):
    _, dynamic = static_and_other(parent, "resnet18")
    other = PARENTS[parent]("resnet34")
    before = {key: value.clone() for key, value in dynamic.state_dict().items()}
    with pytest.raises((UserError, RuntimeError), match=r"layer1\.2"):
        dynamic.load_state_dict(other.state_dict())
    kept = {key for key in before if ".router" in key}
    assert all(torch.equal(dynamic.state_dict()[key], before[key]) for key in kept)


def test_a_parent_keeps_its_own_state_dict_names():
    """The names of a static parent are a subset of those of the dynamic one."""
    static, dynamic = static_and_other("LightningModule", "resnet18")
    added = dynamic.state_dict().keys() - static.state_dict().keys()
    assert static.state_dict().keys() < dynamic.state_dict().keys()
    own = {f"{name}.{key}" for name, router in routers(dynamic).items() for key in router.state_dict()}
    assert added == own
