"""timm's own tests/test_models.py of the installed version, unedited, for one model of each family."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "timm_suite" / "run.py"


@pytest.mark.timeout(1200)
def test_timms_own_tests_pass():
    models = ["dg_resnet18", "dg_mobilenetv2_050", "dg_tf_efficientnet_lite0"]
    models += ["dg_regnetx_002", "dg_regnety_002"]
    process = subprocess.run([sys.executable, str(RUN), *models], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
    assert " failed" not in process.stdout
