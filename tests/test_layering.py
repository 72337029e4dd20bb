"""Imports flow one way: a module of the package imports only those above it in this list."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dg_timm"
ORDER = [
    "version", "graph", "router", "blocks", "stages", "stage", "checkpoint", "introspect", "complexity", "convert",
    "wiring", "data", "hub", "zoo", "__init__",
]  # fmt: skip


def test_every_module_is_listed():
    assert {p.stem for p in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_up_the_list(name):
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dg_timm"):
            inside = node.module.partition(".")[2]
            imported |= {inside} if inside else {alias.name for alias in node.names}
    assert imported <= set(ORDER[: ORDER.index(name)])


def test_importing_needs_no_extra():
    """What a bare `pip install dg-timm` brings must suffice; drawing and training import their extras when called."""
    extras = {"matplotlib", "networkx", "accelerate", "datasets", "evaluate", "sklearn"}
    for path in PACKAGE.glob("*.py"):
        top = {n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))}
        names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {(n.module or "").split(".")[0] for n in top if isinstance(n, ast.ImportFrom)}
        assert not names & extras, path
