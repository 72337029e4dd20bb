"""timm's own tests/test_models.py of the installed version, unedited; `make timm-tests` runs it for every model."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1200)
def test_timms_own_tests_pass():
    models = ["dg_resnet18", "dg_mobilenetv2_050"]  # node 0 of the one is a shortcut, of the other a projection
    command = [sys.executable, "-m", "tests.timm_suite.run", *models]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
    assert " failed" not in process.stdout
