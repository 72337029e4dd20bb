"""timm's own tests/test_models.py of the installed version, unedited; `make timm-tests` runs it for every model."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# node 0 of the one is a projection, of the other a shortcut
@pytest.mark.parametrize("model", ["dg_mobilenetv2_050", pytest.param("dg_resnet18", marks=pytest.mark.slow)])
@pytest.mark.timeout(1200)
def test_timms_own_tests_pass(model):
    command = [sys.executable, "-m", "tests.timm_suite.run", model]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
    assert " failed" not in process.stdout
