"""Blocks, routers and gates that were replaced by what does not fit: an error in every execution."""

import pytest
import torch
from torch import nn

import dg_timm
from tests.helpers.networks import gated_network

EXECUTIONS = ["dense", "sparse"]


class Changed(nn.Module):
    """A block whose feature is changed."""

    def __init__(self, block, change):
        super().__init__()
        self.block, self.change = block, change

    def forward(self, x):
        return self.change(self.block(x))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: None, "returned None; does its forward lack a return"),
        (lambda x: x.mean(0, keepdim=True), "a block must keep the batch"),
        (lambda x: torch.cat([x, x]), "a block must keep the batch"),
        (lambda x: x[:, :, ::2], "every block of a stage must give one shape"),
        (lambda x: x.shape, "gave a Size in place of a tensor"),
    ],
)
def test_a_block_that_does_not_fit_is_named(execution, change, match):
    model, images = gated_network()
    for gate in (module for name, module in model.named_modules() if name.endswith("gate3")):
        nn.init.constant_(gate.fc.bias, 1e6)  # every image runs the block
    model.layer2[2] = Changed(model.layer2[2], change).eval()
    dg_timm.set_execution(model, execution)
    with torch.no_grad(), pytest.raises(dg_timm.UserError, match=match):
        model(images)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layer2.router1", lambda fc: nn.Linear(fc.in_features // 2, fc.out_features)),
        ("layer2.router1", lambda fc: nn.Linear(fc.in_features, 1)),
        ("layer2.gate2", lambda fc: nn.Linear(fc.in_features // 2, 1)),
    ],
)
def test_a_layer_of_the_wrong_width_is_an_error(execution, name, layer):
    model, images = gated_network()
    module = model.get_submodule(name)
    module.fc = layer(module.fc).double()
    dg_timm.set_execution(model, execution)
    with (
        torch.no_grad(),
        pytest.raises((dg_timm.UserError, RuntimeError), match=r"numbers for|cannot be multiplied"),
    ):
        model(images)
