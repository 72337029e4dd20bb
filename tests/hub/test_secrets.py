"""A token reaches the Hub, and nobody else."""

import logging

import huggingface_hub
import pytest

import dg_timm
from dg_timm.hub.push import PublishError, push_folder
from tests.helpers.hub import WRITER
from tests.helpers.loopback_hub import Fault
from tests.helpers.publishing import pull, smallest


def test_a_token_read_with_its_line_end(hub, model):
    assert not dg_timm.push_to_hub(model, "lab/net", token=f" {WRITER}\n").changed


@pytest.mark.parametrize("token", [f"{WRITER[:8]}\n{WRITER[8:]}", f"{WRITER}\u00e9", ""])
def test_a_token_that_is_none_is_not_shown(hub, model, token):
    with pytest.raises(ValueError, match="the token holds characters that no token has") as caught:
        dg_timm.push_to_hub(model, "lab/net", token=token)
    assert WRITER[:8] not in repr(caught.value)


def test_the_token_is_told_to_nobody(hub, model, tmp_path, caplog, capfd, monkeypatch):
    """Not to logs (of the client's debug level), the terminal, errors, files, or the host of the large files."""
    caplog.set_level(logging.DEBUG)
    huggingface_hub.utils.logging.set_verbosity_debug()
    try:
        folder = dg_timm.save_pretrained(model, tmp_path / "folder")
        push_folder(folder, "lab/again", token=WRITER)
        pull("lab/again")
        hub.faults.append(Fault("commit/main", "POST", status=403))
        with pytest.raises(PublishError) as caught:
            push_folder(dg_timm.save_pretrained(smallest(), tmp_path / "other"), "lab/again", token=WRITER)
    finally:
        huggingface_hub.utils.logging.set_verbosity_warning()
    said = [caplog.text, *capfd.readouterr(), str(caught.value), repr(caught.value)]
    assert not any(WRITER in text for text in said)
    for root in (folder, tmp_path / "cache", tmp_path / "hub"):
        assert not any(WRITER.encode() in p.read_bytes() for p in root.glob("**/*") if p.is_file())
    to_the_cdn = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert to_the_cdn
    assert all(request.token is None for request in to_the_cdn)
