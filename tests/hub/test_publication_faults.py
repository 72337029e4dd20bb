"""A Hub that is busy, refuses or breaks off while a network is published: nothing is half-published."""

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

import dg_timm
from dg_timm._errors import UserError
from dg_timm.hub.push import PublishError
from tests.helpers.hub import WRITER
from tests.helpers.loopback_hub import Fault
from tests.helpers.publishing import logits, pull, smallest


@pytest.mark.parametrize("fault", [
    Fault("preupload/main", "POST", status=503),
    Fault("objects/batch", "POST", times=2, status=503),
    Fault("", "PUT", times=2, status=500),
    Fault("preupload/main", "POST", status=429, headers={"Retry-After": "1"}),
    Fault("commit/main", "POST", status=503),
    Fault("commit/main", "POST", status=429, headers={"Retry-After": "5"}),
    Fault("api/models/lab/net", "GET", times=2, status=502),
], ids=["preupload", "batch", "upload", "busy", "commit", "commit-busy", "info"])  # fmt: skip
def test_a_publication_survives_a_busy_hub(hub, model, fault):
    hub.faults.append(fault)
    again = smallest()
    assert dg_timm.push_to_hub(again, "lab/net").changed
    assert fault.times == 0
    if "Retry-After" in fault.headers:
        assert max(hub.pauses) >= int(fault.headers["Retry-After"])
    assert torch.equal(logits(pull()), logits(again))


@pytest.mark.parametrize("status", [401, 403, 413, 500])
@pytest.mark.parametrize("step", ["commit/main", "preupload/main"])
def test_a_publication_that_fails_changes_nothing(hub, model, status, step, tmp_path):
    before = hub.repositories.log("lab/net")
    hub.faults.append(Fault(step, "POST", times=-1, status=status))
    with pytest.raises(PublishError, match=r"hf auth login|may not write|not published|publish again") as caught:
        dg_timm.push_to_hub(smallest(), "lab/net")
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value.__cause__, HfHubHTTPError)
    assert caught.value.__cause__.response.status_code == status
    assert WRITER not in str(caught.value)
    assert hub.repositories.log("lab/net") == before
    assert torch.equal(logits(pull()), logits(model))


def test_a_commit_whose_reply_is_lost_is_published_again_without_harm(hub, model):
    again = smallest()
    hub.faults.append(Fault("commit/main", "POST", cut_after=10))
    with pytest.raises(
        PublishError, match=r"the connection to http.* broke.*publish again, the same content makes no second"
    ):
        dg_timm.push_to_hub(again, "lab/net")
    assert dg_timm.push_to_hub(again, "lab/net").changed is False
    assert torch.equal(logits(pull()), logits(again))


def test_no_hub_at_all(hub, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PublishError, match=r"the connection to http://127.0.0.1:9 broke"):
        dg_timm.push_to_hub(model, "lab/net")
