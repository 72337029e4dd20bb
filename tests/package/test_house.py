"""Rules of the house that no linter knows, over every file of the package.

A rule that fails names the places. There are no lists of exceptions: what can't follow a rule has a home that the rule
names.
"""

import ast
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import dg_timm
from tests.helpers.scripts import python
from tests.package.source import (
    PACKAGE,
    ROOT,
    calls,
    dotted,
    files,
    functions,
    imports,
    module_name,
    place,
    tree,
)

MOST_LINES_OF_A_MODULE = 300
MOST_LINES_OF_A_FUNCTION = 60
# Documented by their packages in spite of the underscore
PUBLIC_AFTER_ALL = {"_asdict", "_exit", "_fields", "_make", "_replace", "_load_from_state_dict", "_save_to_state_dict"}
CORE = ("graph", "execution", "conversion", "analysis", "budget", "models", "hub")

CODE = files("dg_timm", "train_scripts")
TESTS = files("tests")


def none_of(found: Iterable[str], rule: str) -> None:
    listed = sorted(set(found))
    assert not listed, "\n".join([rule, *listed])


def test_there_is_code():
    """The rules below would be empty otherwise."""
    assert len(CODE) > 100
    assert len(TESTS) > 50


def test_no_module_is_long():
    sources = [*CODE, *PACKAGE.rglob("*.c")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    none_of(
        (f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MOST_LINES_OF_A_MODULE),
        f"split what has more than {MOST_LINES_OF_A_MODULE} lines",
    )


def test_no_function_is_long():
    found = []
    for path in (*CODE, *TESTS):
        for function in functions(path):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                found.append(f"{place(path, function)}: {function.name} has {lines} lines")
    none_of(found, f"split what has more than {MOST_LINES_OF_A_FUNCTION} lines")


def is_called_on_a_class(member: ast.AST) -> bool:
    return isinstance(member, ast.FunctionDef) and any(
        dotted(decorator) in (["classmethod"], ["staticmethod"]) for decorator in member.decorator_list
    )


def test_no_module_shares_its_name_with_a_function():
    """`dg_timm.cost` must not be a module for one reader and a function for another.

    Counted are the functions and classes of every module, and what is called on a class. A method is called on an
    object, and shares its name with nothing.
    """
    modules = {path: module_name(path).rpartition(".")[2] for path in files("dg_timm")}
    public: dict[str, str] = {}
    for path in files("dg_timm"):
        for node in tree(path).body:
            members = [member for member in getattr(node, "body", []) if is_called_on_a_class(member)]
            for member in (node, *members):
                if isinstance(member, (ast.FunctionDef, ast.ClassDef)) and not member.name.startswith("_"):
                    public.setdefault(member.name, place(path, member))
    none_of(
        (
            f"{path.relative_to(ROOT)}: {name} is also in {public[name]}"
            for path, name in modules.items()
            if name in public
        ),
        "rename a module that shares its name with a function or class",
    )


def test_every_module_is_importable_under_its_own_name():
    names = [module_name(path) for path in files("dg_timm")]
    if sys.platform != "linux":  # Triton comes with PyTorch there
        names.remove("dg_timm.execution.backends.triton_kernels")
    imported = "".join(f"import {name} as m{k}\n" for k, name in enumerate(names))
    compared = "".join(f"assert m{k} is sys.modules[{name!r}], {name!r}\n" for k, name in enumerate(names))
    # Again, now that all are imported: one may have covered the name of another
    again = "".join(f"import {name} as n{k}\nassert n{k} is m{k}, {name!r}\n" for k, name in enumerate(names))
    process = python("-c", f"import sys\nimport dg_timm\n{imported}{compared}{again}")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("path", [path for path in files("dg_timm") if "__all__" in path.read_text(encoding="utf-8")])
def test_all_is_complete(path):
    """`__all__` lists, in order, what a package offers by importing it, and nothing else."""
    offered: set[str] = set()
    listed: list[str] = []
    for node in tree(path).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            offered |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            offered.add(node.name)
        elif isinstance(node, ast.Assign) and dotted(node.targets[0]) == ["__all__"]:
            listed = ast.literal_eval(node.value)
    assert listed == sorted(listed)
    public = {name for name in offered if not name.startswith("_") or name == "__version__"}
    if path.name == "__init__.py":
        assert set(listed) == public
    assert set(listed) <= set(vars(importlib.import_module(module_name(path))))


def test_only_one_place_renames_files():
    none_of(
        (
            f"{place(path, call)}: {'.'.join(dotted(call.func))}"
            for path in CODE
            if path != PACKAGE / "_files.py"
            for call in calls(path)
            if dotted(call.func) in (["os", "replace"], ["os", "rename"], ["os", "renames"], ["shutil", "move"])
            or (isinstance(call.func, ast.Attribute) and call.func.attr == "rename" and len(call.args) == 1)
            or dotted(call.func)[-1:] in (["mkstemp"], ["NamedTemporaryFile"])
        ),
        "write through dg_timm._files.atomic_path or atomic_write",
    )


def test_only_one_place_switches_and_restores_modes():
    """A function that reads a model's mode and sets one is a guard. ``self.training`` is a module's own."""
    found = []
    for path in CODE:
        if path == PACKAGE / "_modes.py":
            continue
        for function in functions(path):
            modes = [n for n in ast.walk(function) if isinstance(n, ast.Attribute) and n.attr == "training"]
            written = [n for n in modes if isinstance(n.ctx, ast.Store) and dotted(n.value) != ["self"]]
            read = [n for n in modes if isinstance(n.ctx, ast.Load) and dotted(n.value) not in (["self"], [])]
            switches = [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
                        and n.func.attr in ("train", "eval") and dotted(n.func.value)]  # fmt: skip
            same = {tuple(dotted(call.func.value)) for call in switches} & {tuple(dotted(n.value)) for n in read}
            if written or same:
                found.append(f"{place(path, function)}: {function.name}")
    none_of(found, "use dg_timm._modes.evaluating")


def strings(path: Path) -> Iterable[ast.Constant]:
    return (n for n in ast.walk(tree(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def test_only_one_place_writes_markdown_tables():
    none_of(
        (place(path, text) for path in CODE if path != PACKAGE / "_tables.py" for text in strings(path)
         if "---|" in text.value or "|---" in text.value or "--:|" in text.value),
        "use dg_timm._tables.markdown_table",
    )  # fmt: skip


def test_only_one_place_describes_the_hardware():
    sources = {("platform", "processor"), ("torch", "cuda", "get_device_name"), ("platform", "uname")}
    found = []
    for path in CODE:
        if path != PACKAGE / "_hardware.py":
            found += [place(path, call) for call in calls(path) if tuple(dotted(call.func)) in sources]
            found += [place(path, text) for text in strings(path) if text.value in ("model name", "lscpu")]
    none_of(found, "use dg_timm._hardware.describe_hardware or processor_name")


def imported_names(path: Path) -> set[str]:
    """The names that the imports of a file bind in it; those of the package itself don't count."""
    return {
        alias.asname or alias.name.partition(".")[0]
        for node, full in imports(path)
        if not full.startswith("dg_timm")
        for alias in node.names
    }


def opens_text(path: Path, call: ast.Call) -> bool:
    """Whether a call reads or writes text, by its name and by its mode."""
    name = dotted(call.func)[-1:] or ([call.func.attr] if isinstance(call.func, ast.Attribute) else [])
    if name in (["read_text"], ["write_text"]):
        return True
    if name == ["open"]:
        receiver = dotted(call.func)[:-1]
        mode_at = 0 if isinstance(call.func, ast.Attribute) else 1
        if receiver and receiver[0] in imported_names(path):
            return False  # Image.open, tarfile.open and their like
        modes = [*call.args[mode_at : mode_at + 1], *(word.value for word in call.keywords if word.arg == "mode")]
        return not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
    if dotted(call.func)[:1] == ["subprocess"]:
        return any(word.arg in ("text", "universal_newlines") for word in call.keywords)
    return False


def test_text_has_an_encoding():
    """Without one it is the locale's, and a label's name or a card's dash changes from machine to machine."""
    none_of(
        (
            place(path, call)
            for path in (*CODE, *TESTS)
            for call in calls(path)
            if opens_text(path, call) and "encoding" not in {word.arg for word in call.keywords}
        ),
        'say encoding="utf-8" (of subprocesses, too, in place of encoding="utf-8")',
    )


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_AFTER_ALL and name != "_"


def own_private_names() -> set[str]:
    """Every name with an underscore that the package itself gives to a function, class, variable or attribute."""
    found: set[str] = set()
    for path in files("dg_timm"):
        found.add(path.stem)
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and dotted(node.value) == ["self"]:
                found.add(node.attr)
    return {name for name in found if is_private(name)}


def private_uses(path: Path, own: set[str]) -> Iterable[str]:
    for statement, name in imports(path):
        if not name.startswith("dg_timm.") and any(is_private(part) for part in name.split(".")):
            yield f"{place(path, statement)}: {name}"
    others = [[name] for name in imported_names(path)]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own or dotted(node)[:1] in others:
                yield f"{place(path, node)}: {'.'.join(dotted(node)) or node.attr}"
        elif isinstance(node, ast.Call) and dotted(node.func) in (["getattr"], ["setattr"], ["hasattr"]):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(str(name)) and name not in own:
                yield f"{place(path, node)}: {name}"
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            name = str(node.slice.value)
            if is_private(name) and name not in own:
                yield f"{place(path, node)}: {name}"


def test_private_names_of_other_packages_have_one_home():
    own = own_private_names()
    none_of(
        (use for path in CODE if path != PACKAGE / "_compat.py" for use in private_uses(path, own)),
        "use a public name, or put this into dg_timm/_compat.py with a fallback and a test",
    )


def test_the_core_does_not_import_its_own_front():
    """`dg_timm/__init__.py` imports the rooms; a room that imported it would see it half made."""
    core = [path for path in files("dg_timm") if path.parent == PACKAGE or path.relative_to(PACKAGE).parts[0] in CORE]
    front = {name for name in dg_timm.__all__ if not isinstance(getattr(dg_timm, name), type(sys))}
    none_of(
        (
            place(path, statement)
            for path in core
            if path != PACKAGE / "__init__.py"
            for statement, name in imports(path)
            if name == "dg_timm" or (name.startswith("dg_timm.") and name.removeprefix("dg_timm.") in front)
        ),
        "import from the module that defines it",
    )


def test_no_test_imports_another_test():
    none_of(
        (
            f"{place(path, statement)}: {name}"
            for path in TESTS
            for statement, name in imports(path)
            if any(part.startswith("test_") for part in name.split(".")[:-1])
        ),
        "move what tests share to tests/helpers",
    )


def test_nobody_edits_the_search_path():
    none_of(
        (
            place(path, node)
            for path in (*CODE, *TESTS)
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute) and dotted(node) == ["sys", "path"]
        ),
        "run modules with `python -m`, and import from the repository's root",
    )
