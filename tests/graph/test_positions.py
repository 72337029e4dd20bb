"""A stage as a sequence of blocks: reading and replacing them by position, and what is refused."""

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock
from torch import nn

import dg_timm
from dg_timm._errors import UserError
from dg_timm.graph.stage import graph_stages
from tests.helpers.networks import FAMILIES, randomize, randomize_graph
from tests.helpers.stages import images, make_stage


class Adapter(nn.Module):
    """A block, and something that learns behind it."""

    def __init__(self, block, channels):
        super().__init__()
        self.block, self.gain = block, nn.Parameter(torch.full((channels, 1, 1), 2.0, dtype=torch.float64))

    def forward(self, x):
        return self.block(x) * self.gain


@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_blocks_have_the_positions_of_the_static_stage(kind):
    stage = make_stage(kind, 3)
    assert len(stage) == 3
    assert [stage[k] for k in range(len(stage))] == [stage.get_submodule(name) for name in "012"]
    assert stage[-1] is stage.get_submodule("2")
    assert stage[1:] == [stage[1], stage[2]]
    assert stage[1] in stage
    assert nn.Identity() not in stage
    with pytest.raises(IndexError):
        stage[3]


def test_an_entry_block_counts_as_in_the_static_stage():
    static = timm.create_model("convnext_atto")
    model = dg_timm.dynamize(timm.create_model("convnext_atto"))
    assert [len(stage) for stage in graph_stages(model).values()] == [len(stage.blocks) for stage in static.stages]
    static = timm.create_model("resnetblur50")
    names = [name for name, _ in static.layer2.named_children()]
    stage = dg_timm.dynamize(static).layer2
    assert [stage[k] for k in range(len(stage))] == [stage.get_submodule(name) for name in names]


def test_iterating_says_what_to_do():
    stage = make_stage("projection", 3)
    with pytest.raises(TypeError, match=r"no chain and can't be iterated; .*\[stage\[k\] for k in range\(len\(stage"):
        list(stage)


@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_a_block_that_is_replaced_runs_and_learns(kind):
    stage, x = make_stage(kind, 3), images(kind)
    dg_timm.set_threshold(stage, 0.05)
    names = list(dict(stage.named_children()))
    with torch.no_grad():
        before = stage(x)
        for position in (-1, 1):
            stage[position] = Adapter(stage[position], 8)
        stage[1].gain.fill_(1.0)
        stage[2].gain.fill_(1.0)
        assert torch.equal(stage(x), before)
        stage[2].gain.fill_(3.0)
        dense = stage(x)
        stage.execution = "sparse"
        torch.testing.assert_close(stage(x), dense)
        stage.execution = "dense"
    assert not torch.allclose(dense, before)
    assert list(dict(stage.named_children())) == names
    stage(x).square().sum().backward()
    assert all(module.gain.grad.any() for module in stage[1:])
    assert dg_timm.adjacency(stage, x)[""].shape == (3, 5, 5)


def test_the_block_that_projects_cannot_be_replaced_by_one_that_does_not():
    stage, x = make_stage("shortcut", 3), images("shortcut")
    with torch.no_grad():
        before = stage(x)
        with pytest.raises(TypeError, match=r"block '0' of this stage projects .*which a Adapter does not do"):
            stage[0] = Adapter(stage[0], 8)
        with pytest.raises(TypeError, match="blocks are replaced one at a time"):
            stage[:1] = [nn.Identity()]
        with pytest.raises(TypeError, match="a block must be a module, got NoneType"):
            stage[1] = None
        with pytest.raises(IndexError):
            stage[3] = nn.Identity()
        assert torch.equal(stage(x), before)
    with pytest.raises(UserError):
        stage[-3] = nn.Identity()
    twin = make_stage("shortcut", 3)
    stage[0] = twin[0]  # projects as well
    assert stage(x).shape == before.shape


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_a_block_of_another_shape_is_named_when_it_runs(execution):
    """Whether it fits shows when it runs; the next call, with the old block, is right again."""
    model = randomize(timm.create_model("dg_resnet18")).eval()
    x = torch.randn(2, 3, 64, 64)
    dg_timm.set_execution(model, execution)
    with torch.no_grad():
        before = model(x)
        old = model.layer2[1]
        for bad in (BasicBlock(128, 64, downsample=nn.Conv2d(128, 64, 1)), nn.MaxPool2d(2)):
            model.layer2[1] = bad.eval()
            with pytest.raises(UserError, match=r"every block of a stage must give one shape"):
                model(x)
        model.layer2[1] = old
        assert torch.equal(model(x), before)
        assert dg_timm.adjacency(model, x).keys() == graph_stages(model).keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_block_is_what_tools_hook(name):
    """Grad-CAM takes ``model.layer4[-1]``: its hook sees the map and the gradient of every image."""
    model = randomize(randomize_graph(timm.create_model(name, num_classes=3)))
    stage = list(graph_stages(model).values())[-1]
    maps = []
    stage[-1].register_forward_hook(lambda module, args, out: maps.append(out) or out.retain_grad())
    dg_timm.set_threshold(model, 0.0)
    model(torch.randn(2, 3, 64, 64))[:, 0].sum().backward()
    assert maps[0].grad.shape == maps[0].shape
    assert maps[0].grad.flatten(1).any(1).all()


def test_what_was_put_past_the_index_in_the_place_of_the_block_that_projects_is_named():
    model = timm.create_model("dg_resnet18").eval()
    setattr(model.layer2, "0", nn.Conv2d(64, 128, 3, 2, 1))  # as tools do
    for ask in (model, lambda x: dg_timm.cost(model, x)):
        with pytest.raises(dg_timm.UserError, match="node 0's feature, too, which a Conv2d can't"):
            ask(torch.randn(1, 3, 64, 64))
