"""A training that several modules look at."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers.training import FINISHED, train


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder and the output of a training of two epochs with an average of the weights."""
    output = tmp_path_factory.mktemp("runs") / "one"
    process = train(*FINISHED, "--output", output)
    assert process.returncode == 0, process.stderr
    return output, process
