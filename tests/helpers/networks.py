"""Networks for tests. Norms always have non-trivial statistics: fresh ones hide mistakes."""

import pytest
import timm
import torch
from torch import nn

from dg_timm.graph.gate import gates
from dg_timm.graph.stage import routers

ZOO = timm.list_models("dg_*")
# one small model of each family: block classes, activations and stage layouts all differ
FAMILIES = [
    "dg_resnet18",
    "dg_resnet50",
    "dg_mobilenetv2_050",
    "dg_tf_efficientnet_lite0",
    "dg_regnetx_002",
    "dg_regnety_002",
]
# A basic block with a shortcut for node 0, and one with a new projection; the rest of the families in the slow suite
QUICK = ("dg_resnet18", "dg_mobilenetv2_050")
QUICK_FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def randomize(model: nn.Module) -> nn.Module:
    """Give every norm statistics and an affine map far from the identity, in place; eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def randomize_graph(model: nn.Module, spread: float = 1.0) -> nn.Module:
    """Give every router random weights, scales and a threshold, so that edges differ between images and some close."""
    with torch.no_grad():
        for router in routers(model).values():
            if hasattr(router, "fc"):
                nn.init.normal_(router.fc.weight, std=spread)
            nn.init.normal_(router.fc.bias if hasattr(router, "fc") else router.logits, std=0.5)
            if router.scale is not None:
                router.scale.mul_(torch.empty_like(router.scale).uniform_(0.5, 1.5))
            router.threshold.uniform_(0.0, 0.2)
    return model


def static_and_dynamic(name: str, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """A static model with random norms, and its identity conversion through the zoo's loading filter."""
    static = randomize(timm.create_model(name.removeprefix("dg_"), **kwargs))
    overlay = dict(state_dict=static.state_dict(), num_classes=static.num_classes)
    dynamic = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    return static, dynamic.eval()


BIG = 100.0


@torch.no_grad()
def close_at_random(module: nn.Module, openness: float) -> None:
    """Thresholds at a quantile of random weights; the routers differ between images."""
    randomize_graph(module, spread=3.0)
    for router in routers(module).values():
        router.fc.weight.mul_(BIG)
        router.fc.bias.uniform_(-3, 3)
        router.threshold.fill_(1.6 * (1 - openness))


@torch.no_grad()
def gated_network(name: str = "dg_cifar_resnet20", seed: int = 1, **options: object) -> tuple[nn.Module, torch.Tensor]:
    """A network of which every image skips about half of the blocks, each its own, and images; in double precision."""
    torch.manual_seed(seed)
    model = randomize_graph(randomize(timm.create_model(name, gates=True, num_classes=10, **options))).double()
    images = torch.randn(8, 3, 32, 32, dtype=torch.double) + torch.randn(8, 3, 1, 1, dtype=torch.double)

    def split_images(fc: nn.Module, args: tuple, logit: torch.Tensor) -> torch.Tensor:
        middle = logit.median()
        fc.bias -= middle - 1e-6
        return logit - middle + 1e-6

    hooks = []
    for gate in gates(model).values():
        nn.init.normal_(gate.fc.weight, std=10.0)
        nn.init.constant_(gate.shift, -1.0)
        hooks.append(gate.fc.register_forward_hook(split_images))
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return model, images


def closing_network(seed: int = 1, **options: object) -> tuple[nn.Module, torch.Tensor]:
    """A network of which random images remove some blocks, in double precision."""
    torch.manual_seed(seed)
    model = randomize_graph(timm.create_model("dg_cifar_resnet20", **options).double().eval(), spread=3.0)
    with torch.no_grad():
        for router in routers(model).values():
            router.fc.weight.normal_(std=8.0)
            router.fc.bias.uniform_(-3, 3)
            router.threshold.fill_(0.3)
    return model, torch.randn(8, 3, 32, 32, dtype=torch.double)
