"""Compute the input of a block again in the backward pass, instead of keeping it: its sources are kept anyway.

The invariant: a tensor that autograd saves while a block runs is replaced by its recipe only if it is the very memory,
shape, type and version that the recipe made; and the recipe refuses to run if a source has changed since.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dg_timm import _compat
from dg_timm.execution.operators import weighted_sum


@contextlib.contextmanager
def recomputing() -> Iterator["Recipes | None"]:
    """While a block runs inside the ``with`` block, keep recipes in place of what they make.

    Gives None where saved tensors have hooks already (activations moved to another device, say): those come first.
    """
    if not _compat.may_hook_saved_tensors():
        yield None
        return
    recipes = Recipes()
    with torch.autograd.graph.saved_tensors_hooks(recipes.pack, recipes.unpack):
        yield recipes


class Recipes:
    """How to make the inputs of one block; at most two, its input and its shortcut."""

    def __init__(self) -> None:
        self._known: list[RecomputedInput] = []

    def add(self, z: Tensor, features: Sequence[Tensor], weights: Tensor) -> None:
        """Say that ``z`` is the weighted sum of ``features``."""
        self._known.append(RecomputedInput(z, features, weights))

    def pack(self, saved: Tensor) -> object:
        """What to keep for the backward pass."""
        for recipe in self._known:
            if recipe.makes(saved):
                return recipe
        return saved

    @staticmethod
    def unpack(kept: object) -> Tensor:
        """What the backward pass needs."""
        return kept.make() if isinstance(kept, RecomputedInput) else kept  # type: ignore[return-value]


class RecomputedInput:
    """A node's input, as its sources and their weights."""

    def __init__(self, z: Tensor, features: Sequence[Tensor], weights: Tensor) -> None:
        self._key = _key(z)
        self._features, self._weights = [feature.detach() for feature in features], weights.detach()
        self._versions = [_compat.version_of(feature) for feature in self._features]

    def makes(self, saved: Tensor) -> bool:
        """Whether ``saved`` is what this makes."""
        return _key(saved) == self._key

    def make(self) -> Tensor:
        """Compute the input again."""
        if [_compat.version_of(feature) for feature in self._features] != self._versions:
            raise RuntimeError(
                "a feature that is needed to compute gradients has been modified by an inplace operation after the "
                "stage read it; modify a clone"
            )
        with torch.no_grad():
            return weighted_sum(self._features, self._weights)


def _key(z: Tensor) -> tuple[object, ...]:
    # the version, too: a block may change its input in place and save what became of it
    return z.data_ptr(), z.shape, z.stride(), z.dtype, _compat.version_of(z)
