"""Imports flow one way: a module of the package imports only those above it in this list."""

import ast
import operator
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dg_timm"
ORDER = [
    "version", "graph", "cpu_kernels", "cuda_kernels", "map_memory", "aggregation", "router", "blocks", "stages",
    "gates", "sparse", "stage", "checkpoint", "introspect", "complexity", "cost", "budget", "random_graphs", "convert",
    "wiring", "card", "download", "hub", "publish", "cifar", "randwire", "zoo", "__init__",
]  # fmt: skip
# What trains networks may use all of the package; nothing of the package uses it.
TRAINING = [
    "sources", "loading", "metrics", "models", "optimization", "objective", "processes", "evaluation", "checkpoints",
    "report", "trainer", "arguments", "setup", "run", "dry_run", "__init__",
]  # fmt: skip
DETECTION = [
    "digits", "boxes", "coco", "tables", "annotations", "loading", "detectors", "objective", "evaluation", "pictures",
    "arguments", "__init__",
]  # fmt: skip
EXTRAS = {"matplotlib", "networkx", "accelerate", "datasets", "evaluate", "sklearn", "psutil", "torchmetrics"}


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dg_timm"):
            inside = (node.module or "").partition(".")[2]
            found |= {f"{inside}.{a.name}" if inside in ("", "training", "detection") else inside for a in node.names}
    return {name.removeprefix(".") for name in found}


@pytest.mark.parametrize(
    ("folder", "order"), [(PACKAGE, ORDER), (PACKAGE / "training", TRAINING), (PACKAGE / "detection", DETECTION)]
)
def test_every_module_is_listed(folder, order):
    assert {p.stem for p in folder.glob("*.py")} == set(order)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_up_the_list(name):
    assert imported(PACKAGE / f"{name}.py") <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", TRAINING)
def test_imports_of_training_point_up_the_list(name):
    allowed = {*ORDER, *(f"training.{above}" for above in TRAINING[: TRAINING.index(name)])}
    assert imported(PACKAGE / "training" / f"{name}.py") <= allowed


@pytest.mark.parametrize("name", DETECTION)
def test_imports_of_detection_point_up_the_list(name):
    above = {f"detection.{other}" for other in DETECTION[: DETECTION.index(name)]}
    allowed = {*ORDER, "training", *(f"training.{other}" for other in TRAINING), *above}
    assert imported(PACKAGE / "detection" / f"{name}.py") <= allowed


def test_importing_needs_no_extra():
    """What a bare `pip install dg-timm` brings must suffice; drawing and training import their extras when called."""
    for path in PACKAGE.glob("*.py"):
        top = {n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))}
        names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {(n.module or "").split(".")[0] for n in top if isinstance(n, ast.ImportFrom)}
        assert not names & EXTRAS, path


def test_what_the_readme_calls_is_there_after_import_dg_timm():
    import dg_timm

    called = set(re.findall(r"\bdg_timm((?:\.\w+)+)\(", (PACKAGE.parent / "README.md").read_text()))
    assert len(called) > 8
    for name in called:
        assert callable(operator.attrgetter(name[1:])(dg_timm)), name
