"""What the code imports, pyproject.toml declares, and nothing more; the core needs no extra."""

import operator
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.scripts import execute
from tests.package.source import ROOT, files, imported_at_start, imports
from tests.package.versions import CONTRACT, floor_of, requirements

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = tuple(PROJECT["optional-dependencies"])
# The extra that a room above the core may import at its start; below training there is none.
NEEDS = {"training": "train", "cli": "train", "detection": "detect", "benchmarks": "detect", "experiments": "detect"}
# Declared, and never imported: another package needs them for what we ask of it.
INDIRECT = {
    "jinja2": "huggingface_hub renders model cards with it",
    "pycocotools": "torchmetrics computes COCO's AP by it",
}
WITH_TORCH = "triton"  # torch installs it where it runs


def declared(*extras: str) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements(list(extras))}


known_distributions = cache(packages_distributions)  # it reads every file of the environment


def distributions(modules: set[str]) -> set[str]:
    """The packages, by their names in the index, that bring these modules; the standard library doesn't count."""
    known = known_distributions()
    others = modules - sys.stdlib_module_names - {"dg_timm", "dg_timm_cli", "tests", WITH_TORCH}
    missing = others - known.keys()
    assert not missing, f"not installed: {missing}"
    return {canonicalize_name(known[name][0]) for name in others}


def room(path: Path) -> str:
    return path.relative_to(ROOT / "dg_timm").parts[0]


@pytest.mark.parametrize("path", files("dg_timm"), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_module_imports_is_installed_with_its_extra(path):
    """A bare `pip install dg-timm` suffices for the core; what draws or trains imports its extra when it is called."""
    extras = [NEEDS[room(path)]] if room(path) in NEEDS else []
    assert distributions(imported_at_start(path)) <= declared(*extras)
    named = {name.partition(".")[0] for _, name in imports(path)}
    assert distributions(named) <= declared("plots", "train", "detect")


def test_what_is_declared_is_imported():
    used = distributions({name.partition(".")[0] for path in files("dg_timm") for _, name in imports(path)})
    assert declared("plots", "train", "detect") - used == INDIRECT.keys()


def test_what_tests_import_is_declared():
    used = distributions({name.partition(".")[0] for path in files("tests") for _, name in imports(path)})
    assert used <= declared("dev")


def test_every_requirement_has_a_floor_that_can_be_installed():
    for requirement in requirements(list(EXTRAS)):
        assert re.fullmatch(r"[\w.-]+==[\d.]+", floor_of(requirement)), requirement
        assert requirement.specifier.contains(floor_of(requirement).partition("==")[2])


def test_a_requirement_without_a_floor_is_refused():
    with pytest.raises(ValueError, match="torch names no floor"):
        floor_of(Requirement("torch"))


def test_extras_that_name_extras_are_followed():
    assert {"torch", "matplotlib", "accelerate", "torchmetrics"} <= declared("detect")
    assert declared("detect") < declared("dev")
    assert "matplotlib" not in declared("train")


def test_the_contract_tests_are_there():
    assert all((ROOT / path).exists() for path in CONTRACT)


@pytest.mark.parametrize("path", sorted((ROOT / "train_scripts").rglob("*.py")), ids=lambda path: path.name)
def test_scripts_are_thin(path):
    """They only start what lies in the package."""
    assert len(path.read_text(encoding="utf-8").splitlines()) < 20
    assert {name.partition(".")[0] for _, name in imports(path)} <= {"dg_timm", "sys"}


def test_imports_go_one_way():
    """The contracts of pyproject.toml; `make check` runs them, too."""
    process = execute([str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"], cwd=ROOT)
    assert process.returncode == 0, process.stdout + process.stderr


def test_what_the_readme_calls_is_there_after_import_dg_timm():
    import dg_timm

    called = set(re.findall(r"\bdg_timm((?:\.\w+)+)\(", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(called) > 4
    for name in called:
        assert callable(operator.attrgetter(name[1:])(dg_timm)), name
