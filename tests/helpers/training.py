"""Short trainings on digits, as users start them."""

import subprocess

from tests.helpers.scripts import run

DATA = ("--data", "digits", "--image-size", "32")
TINY = (*DATA, "--hflip", "0", "--batch-size", "32", "--workers", "0", "--log-every", "1")
# a network without BatchNorm, so that nothing depends on how a batch is shared; and one with it
PLAIN = ("--model", "dg_test_convnext2", "--opt", "adamw", "--lr", "1e-3", *TINY)
NORMED = ("--model", "dg_test_resnet", *TINY)
# what the run of the fixture `finished` was started with
FINISHED = (*PLAIN, "--train-limit", "320", "--epochs", "2", "--ema-decay", "0.9")


def train(*args: object, processes: int = 1, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run train.py to its end."""
    return run("train.py", *args, processes=processes, timeout=timeout)


def validate(*args: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run validate.py on digits, without workers."""
    return run("validate.py", *args, *DATA, "--workers", "0", processes=processes)
