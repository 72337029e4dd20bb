"""The Python files of the repository as syntax trees, for tests of how they are written."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dg_timm"


@cache
def files(*folders: str) -> tuple[Path, ...]:
    """The Python files below these folders of the repository, in order."""
    return tuple(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST) -> str:
    """``file:line`` as editors read it."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def module_name(path: Path) -> str:
    """The name under which a file of the package is imported: ``dg_timm.graph.stage``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file, methods and nested ones, too."""
    return (node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def dotted(node: ast.expr) -> list[str]:
    """``a.b.c`` as its names; empty where the expression is no plain chain of attributes."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *names[::-1]] if isinstance(node, ast.Name) else []


def imports(path: Path) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """(statement, full name) of everything that a file imports; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{place(path, node)}: a relative import; write the full name"
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def imported_at_start(path: Path) -> set[str]:
    """The top-level names of the packages that importing a file imports; what functions import doesn't count."""
    waiting: list[ast.AST] = [tree(path)]
    statements = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and dotted(node.test)[-1:] == ["TYPE_CHECKING"]:
            waiting += node.orelse
            continue
        statements.add(node)
        waiting += ast.iter_child_nodes(node)
    return {name.partition(".")[0] for statement, name in imports(path) if statement in statements}
