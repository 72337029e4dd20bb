"""Random numbers that depend on what is augmented, and on nothing that was drawn before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators from integers, and restore all three after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # not torch.manual_seed: it reseeds accelerators as well, or keeps a stack trace for each call to do so later
    torch.random.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
