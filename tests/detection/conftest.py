"""Shared fixtures of the tests of detection."""

import pytest

from dg_timm.detection.data.annotations import load_detection
from dg_timm.detection.data.boxes import DetectionSplits


@pytest.fixture(scope="session")
def pages() -> DetectionSplits:
    """Both splits of the pages of digits; tests replace parts of them, and change nothing in place."""
    return load_detection("digits")
