"""A Hub, a network or a publisher that misbehaves: every pull ends in success or in a clear error, and leaves no half.

The client's own errors are taken as they are where they say what to do; what is tested here is that they arrive.
"""

import os
import pickle
import random
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError
from safetensors.torch import save_file

import dg_timm
from dg_timm._errors import BadState, BadType, BadValue
from dg_timm.hub.downloads import NETWORK_ERRORS, DownloadError
from tests.helpers.loopback_hub import Fault
from tests.helpers.publishing import logits, pull


def cached(tmp_path):
    """Files of the cache that hold anything of a repository, and those that are half-written."""
    files = [p for p in (tmp_path / "cache").glob("models--*/**/*") if p.is_file() and "refs" not in p.parts]
    return [p for p in files if "incomplete" not in p.name], [p for p in files if "incomplete" in p.name]


def test_what_the_client_raises_is_a_network_error(hub, model):
    """Not every error of the client's HTTP library is an OSError."""
    assert issubclass(HfHubHTTPError, NETWORK_ERRORS)
    hub.faults.append(Fault("", "", times=-1, cut_after=0))
    with pytest.raises(NETWORK_ERRORS) as caught:
        huggingface_hub.HfApi().model_info("lab/net")
    assert not isinstance(caught.value, HfHubHTTPError)


def test_connections_cut_at_random_offsets(hub, model, tmp_path):
    size = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    rng = random.Random(0)
    offsets = sorted(rng.randrange(size) for _ in range(10))
    lengths = [b - a for a, b in zip([0, *offsets], offsets, strict=False)]
    hub.faults += [Fault("model.safetensors", "GET", cut_after=length) for length in lengths]
    assert torch.equal(logits(pull()), logits(model))
    assert not any(fault.times for fault in hub.faults if fault.cut_after != 0)
    assert cached(tmp_path)[1] == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_too_many_requests(hub, model, name, method):
    hub.faults.append(Fault(name, method, status=429, headers={"Retry-After": "7"}))
    assert torch.equal(logits(pull()), logits(model))
    assert hub.faults[0].times == 0
    if method == "GET":
        assert max(hub.pauses) >= 7  # a HEAD is asked again at once, with a longer timeout


@pytest.mark.parametrize(("name", "method"), [("config.json", "HEAD"), ("model.safetensors", "HEAD"),
                                              ("model.safetensors", "GET")])  # fmt: skip
def test_unavailable_twice(hub, model, name, method):
    hub.faults.append(Fault(name, method, times=2, status=503))
    assert torch.equal(logits(pull()), logits(model))
    assert hub.faults[0].times == 0


@pytest.mark.parametrize(
    ("status", "error", "match"),
    [
        (401, (HfHubHTTPError, DownloadError), "401"),
        (403, (HfHubHTTPError, LocalEntryNotFoundError, DownloadError), "403|connection"),
        (404, (HfHubHTTPError, DownloadError), "Entry Not Found|has no weights"),
        (500, OSError, "500|connection"),
        (503, OSError, "503|connection"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_refused_for_good(hub, model, tmp_path, name, method, status, error, match):
    codes = {"X-Error-Code": "EntryNotFound"} if status == 404 else {}
    hub.faults.append(Fault(name, method, times=-1, status=status, headers=codes))
    with pytest.raises(error, match=match):
        pull()
    whole, halves = cached(tmp_path)
    assert halves == []
    assert not any(p.name == name for p in whole)
    hub.faults.clear()
    assert torch.equal(logits(pull()), logits(model))  # what is in the cache spoils nothing


def test_a_refused_download_uses_what_is_cached(hub, model):
    pull()
    hub.faults.append(Fault("", "", times=-1, status=503))
    assert torch.equal(logits(pull()), logits(model))


def test_silence(hub, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.faults.append(Fault("model.safetensors", "GET", stall=1))
    wait = threading.Event().wait  # time.sleep is the fixture's
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(1.5 if seconds == 1 else 0.01))
    assert torch.equal(logits(pull()), logits(model))
    assert hub.faults[0].times == 0


@pytest.mark.parametrize("times", [1, -1])
def test_content_with_another_hash(hub, model, tmp_path, times):
    """As long as the right one and sound as safetensors: only the SHA-256 tells."""
    other = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "other.safetensors").read_bytes()
    hub.faults.append(Fault("model.safetensors", "GET", times=times, content=content))
    if times == 1:
        assert torch.equal(logits(pull()), logits(model))
        return
    with pytest.raises(
        DownloadError, match=r"model.safetensors of lab/net could not be downloaded in 3 attempts: .* SHA-256"
    ):
        pull()
    assert not [p for p in cached(tmp_path)[0] if p.stat().st_size > 1_000_000]
    hub.faults.clear()
    assert torch.equal(logits(pull()), logits(model))


def test_a_file_of_another_length(hub, model, tmp_path):
    hub.faults.append(Fault("model.safetensors", "GET", times=-1, content=b"short"))
    with pytest.raises(DownloadError, match=r"could not be downloaded in 3 attempts: .*Consistency check failed"):
        pull()
    assert cached(tmp_path)[1] == []


def files_of(model, tmp_path):
    folder = dg_timm.save_pretrained(model, tmp_path / "folder")
    return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


def test_truncated_safetensors(hub, model, tmp_path):
    files = files_of(model, tmp_path)
    for keep in (0, 4, 1000, len(files["model.safetensors"]) - 1):
        hub.repositories.put("ada/cut", {**files, "model.safetensors": files["model.safetensors"][:keep]})
        with pytest.raises(BadState, match=r"weights of dg_test_resnet can't be read.*truncated or damaged"):
            pull("ada/cut")


def test_a_configuration_of_an_unknown_model(hub, model, tmp_path):
    files = files_of(model, tmp_path)
    hub.repositories.put(
        "ada/net", {**files, "config.json": files["config.json"].replace(b"dg_test_resnet", b"dg_none")}
    )
    with pytest.raises(RuntimeError, match=r"Unknown model \(dg_none\)"):
        pull("ada/net")


def test_a_configuration_with_an_unknown_option(hub, model, tmp_path):
    files = files_of(model, tmp_path)
    spoiled = files["config.json"].replace(b'"pretrained_cfg"', b'"model_args": {"edges": 3}, "pretrained_cfg"', 1)
    hub.repositories.put("ada/net", {**files, "config.json": spoiled})
    with pytest.raises(BadType, match=r"'edges'.*options are edge_scale, block_shortcut,"):
        pull("ada/net")


def test_weights_of_another_network(hub, model, tmp_path):
    files = files_of(model, tmp_path)
    hub.repositories.put("ada/net", {**files, "config.json": files["config.json"].replace(b"test_resnet", b"resnet18")})
    with pytest.raises((RuntimeError, ValueError), match=r"(?s)size mismatch|shape"):
        pull("ada/net")


class Malicious:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("beside_safetensors", [False, True])
def test_a_pickle_is_never_executed(hub, model, tmp_path, beside_safetensors):
    files = files_of(model, tmp_path)
    trap = tmp_path / "executed"
    files["pytorch_model.bin"] = pickle.dumps({"fc.weight": Malicious(trap)}, protocol=2)
    if not beside_safetensors:
        del files["model.safetensors"]
    hub.repositories.put("ada/net", files)
    if beside_safetensors:
        assert torch.equal(logits(pull("ada/net")), logits(model))
    else:
        with pytest.raises(RuntimeError, match="weights_only=True blocked loading"):
            pull("ada/net")
    assert not trap.exists()


def test_no_weights_at_all(hub, model, tmp_path):
    files = files_of(model, tmp_path)
    hub.repositories.put("ada/net", {"config.json": files["config.json"]})
    with pytest.raises(DownloadError, match=r"ada/net has no weights: none of model.safetens"):
        pull("ada/net")


def test_an_index_with_a_path_outside(hub, model, tmp_path):
    files = files_of(model, tmp_path)
    index = b'{"metadata": {}, "weight_map": {"fc.weight": "../../../etc/passwd"}}'
    hub.repositories.put("ada/net", {"config.json": files["config.json"], "model.safetensors.index.json": index})
    with pytest.raises(BadValue, match=r"must be a .safetensors file beside its index"):
        pull("ada/net")


@pytest.mark.parametrize("repo_id", ["../../etc", "lab/../net", "..", "lab/net/../../x"])
def test_a_repository_id_with_a_path_outside(hub, repo_id):
    with pytest.raises((ValueError, HfHubHTTPError), match=r"Repo id must|HFValidationError|repo"):
        timm.create_model(f"hf-hub:{repo_id}", pretrained=True)
    assert not hub.requests


def test_a_revision_that_is_not_there(hub, model):
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        pull("lab/net@nowhere")


def test_a_damaged_configuration_is_found_and_removed(hub, model):
    """Of the same length and still JSON: timm takes it."""
    config = huggingface_hub.hf_hub_download("lab/net", "config.json")
    blob = Path(config).resolve()
    blob.write_bytes(blob.read_bytes().replace(b'"crop_pct": 0.', b'"crop_pct": 1.'))
    with pytest.raises(DownloadError, match=r"config.json of lab/net in the cache does not have the hash"):
        pull()
    assert torch.equal(logits(pull()), logits(model))


def test_a_damaged_cache(hub, model, monkeypatch):
    pull()
    blob = Path(huggingface_hub.hf_hub_download("lab/net", "model.safetensors")).resolve()
    content = bytearray(blob.read_bytes())
    content[-3] ^= 1
    blob.write_bytes(content)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"in the cache is damaged .* no connection to fetch it again"):
        pull()
    assert blob.read_bytes() == content  # it is the only copy
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert torch.equal(logits(pull()), logits(model))


def test_a_configuration_can_not_ask_for_loose_loading(hub, model, tmp_path):
    files = files_of(model, tmp_path)
    loose = files["config.json"].replace(
        b'"pretrained_cfg"', b'"model_args": {"pretrained_strict": false}, "pretrained_cfg"'
    )
    hub.repositories.put("ada/net", {**files, "config.json": loose})
    with pytest.raises(BadType, match="pretrained_strict=False would leave parts"):
        pull("ada/net")
