"""Shared fixtures. Models are always randomised with non-trivial norm statistics: fresh ones hide mistakes."""

import atexit
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from loopback_hub import DiskRepositories, HubServer, User

# Before the first import of huggingface_hub: no test reaches the Hub or leaves a cache behind. The server answers on
# the loopback, and only where a test asks for `hub`: the others are offline.
HF_HOME = Path(tempfile.mkdtemp(prefix="dg-timm-tests-"))
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
WRITER, READER, STRANGER = (f"hf_{name}0000000000000000000000" for name in ("writer", "reader", "stranger"))
USERS = {
    WRITER: User("ada", organisations=("lab",)),
    READER: User("bob", organisations=("lab",), may_write=False),
    STRANGER: User("eve"),
}
_SERVER = HubServer(DiskRepositories(HF_HOME / "repositories", USERS))
_SERVER.__enter__()
os.environ |= {
    "HF_HOME": str(HF_HOME),
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": _SERVER.url,
    "HF_HUB_DISABLE_XET": "1",  # its protocol is not spoken here
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
os.environ.pop("HF_TOKEN", None)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of dependencies, on import
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import evaluate  # noqa: F401
    import huggingface_hub.constants
    import timm

import dg_timm  # noqa: E402

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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> HubServer:
    """The loopback Hub, empty, with an empty cache; the user is WRITER (of the organisation ``lab``) and online."""
    _SERVER.repositories = DiskRepositories(tmp_path / "hub", USERS)
    _SERVER.requests.clear()
    _SERVER.faults.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return _SERVER


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
        for router in dg_timm.checkpoint.routers(model).values():
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
