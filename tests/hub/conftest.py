"""A published network, and a Hub whose pauses are short."""

import time

import pytest

import dg_timm
from tests.helpers.publishing import smallest


@pytest.fixture
def model(hub, monkeypatch):
    """Published as lab/net; pauses between attempts are noted in ``hub.pauses`` and kept short."""
    network = smallest()
    dg_timm.push_to_hub(network, "lab/net")
    hub.requests.clear()
    pause = time.sleep

    def shortened(seconds):
        hub.pauses.append(seconds)
        pause(min(seconds, 0.01))

    hub.pauses = []
    monkeypatch.setattr(time, "sleep", shortened)
    return network
