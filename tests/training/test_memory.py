"""A training on the CPU keeps the memory that it frees. Counted in page faults, in processes of their own."""

import platform

import pytest
import torch

from dg_timm.training.run.memory import keep_freed_memory
from tests.helpers.scripts import python

FAULTS = """
import resource, torch
from dg_timm.training.run.memory import keep_freed_memory
from tests.helpers.scripts import python
print(keep_freed_memory(torch.device("{device}")))
torch.ones(2**24); torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)  # 64 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(device):
    kept, count = python("-c", FAULTS.format(device=device)).stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is glibc's own")
def test_what_is_freed_is_used_again(monkeypatch):
    kept, count = faults("cpu")
    assert kept
    kept, untouched = faults("cuda")
    assert not kept
    assert count < untouched / 10
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert not keep_freed_memory(torch.device("cpu"))
