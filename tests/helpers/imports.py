"""Imports of libraries that warn on import."""

import importlib
import warnings
from types import ModuleType


def quietly_import(name: str) -> ModuleType:
    """Import a library whose own import warns. Missing, it fails: it is what the extra ``downstream`` is for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
