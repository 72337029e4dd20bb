"""Networks to publish, and what to do with a published one. Import it only in tests: it imports timm."""

from pathlib import Path

import timm
import torch
from torch import nn

import dg_timm
from tests.helpers.networks import randomize, randomize_graph


def small(name: str = "dg_regnetx_002", **options: object) -> nn.Module:
    """A small network of the zoo, random in every parameter, for ten classes."""
    return randomize_graph(randomize(timm.create_model(name, num_classes=10, **options)))


def smallest() -> nn.Module:
    """The smallest network that there is. It is not in the zoo, and registered here."""
    dg_timm.models.register("dg_test_resnet")
    return small("dg_test_resnet")


def converted(name: str) -> nn.Module:
    """A model of the zoo as publish.py loads it, with random weights in place of timm's."""
    static = timm.create_model(name.removeprefix("dg_"), pretrained=False)
    weights = dict(state_dict=static.state_dict())
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=weights).eval()


def pull(repo_id: str = "lab/net", **options: object) -> nn.Module:
    """The network in a repository of the loopback Hub."""
    return timm.create_model(f"hf-hub:{repo_id}", pretrained=True, **options)


def logits(model: nn.Module) -> torch.Tensor:
    """What a model predicts for two fixed images."""
    with torch.inference_mode():
        return model.eval()(torch.linspace(-1, 1, 2 * 3 * 48 * 48).view(2, 3, 48, 48))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
