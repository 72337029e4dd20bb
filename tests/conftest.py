"""Set up the environment of all tests, before anything reads it, and hold the fixtures that every room uses."""

import atexit
import contextlib
import importlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from tests.helpers import preloaded
from tests.helpers.hub import USERS, WRITER
from tests.helpers.loopback_hub import DiskRepositories, HubServer

# Before the first import of huggingface_hub: no test reaches the Hub or leaves a cache behind. The server answers on
# the loopback, and only where a test asks for `hub`: the others are offline.
HF_HOME = Path(tempfile.mkdtemp(prefix="dg-timm-tests-"))
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
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
preloaded.take_environment()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other packages, as they are imported; in tests, warnings are errors
    import huggingface_hub.constants

    for _optional in ("accelerate", "datasets", "evaluate"):  # the contract tests run without them, too
        with contextlib.suppress(ImportError):
            importlib.import_module(_optional)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give every test the same random numbers, whatever ran before it."""
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
