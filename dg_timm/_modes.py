"""Run a model in evaluation mode for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode; give every module its own mode back afterwards, also after an exception.

    This switches modules. What must not disturb other threads runs :func:`dg_timm.adjacency` and its like instead.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
