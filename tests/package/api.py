"""The public API as data: what ``dg_timm.__all__`` names, with signatures.

    python -m tests.package.api

accepts the API as it is now: it rewrites public_api.json (``make api`` does the same). ``test_public_api.py`` compares.
Signatures are read from the source, because Python's own text of a type changes from release to release.
"""

import ast
import inspect
import json
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import dg_timm
from dg_timm._files import atomic_write

FILE = Path(__file__).parent / "public_api.json"


def describe(thing: Any) -> dict[str, Any]:
    """The kind of a public object, and what a caller can rely on."""
    if inspect.ismodule(thing):
        return {"kind": "module", "members": {name: _member(getattr(thing, name)) for name in _public_names(thing)}}
    return _member(thing)


def _member(thing: Any) -> dict[str, Any]:
    if inspect.ismodule(thing):
        return {"kind": "module"}  # of a module: what it holds is its own affair
    if inspect.isclass(thing):
        return _class(thing)
    if inspect.isroutine(thing):
        return {"kind": "function", "signature": _signature(_definition(thing))}
    return {"kind": "constant", "type": type(thing).__name__}


def _public_names(module: ModuleType) -> list[str]:
    """``__all__`` of a module; without one, the functions and classes that it defines."""
    own = (name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__)
    return sorted(getattr(module, "__all__", None) or (name for name in own if not name.startswith("_")))


def _class(thing: type) -> dict[str, Any]:
    definition = _definition(thing)
    members: dict[str, str] = {}
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            decorators = [f"@{ast.unparse(decorator)} " for decorator in node.decorator_list]
            members[node.name] = "".join(decorators) + _signature(node)
        elif isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            default = f" = {ast.unparse(node.value)}" if node.value else ""
            members[ast.unparse(node.target)] = ast.unparse(node.annotation) + default
    decorators = [ast.unparse(decorator) for decorator in definition.decorator_list]
    bases = [base.__name__ for base in thing.__bases__ if base is not object]
    return {"kind": "class", "bases": bases, "decorators": decorators, "members": members}


def _definition(thing: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body[0]


def _signature(definition: ast.FunctionDef) -> str:
    returned = f" -> {ast.unparse(definition.returns)}" if definition.returns else ""
    return f"({ast.unparse(definition.args)}){returned}"


def public_api() -> dict[str, Any]:
    return {name: describe(getattr(dg_timm, name)) for name in sorted(dg_timm.__all__)}


def frozen_api() -> dict[str, Any]:
    """What public_api.json says."""
    api: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return api


def differences(was: Any, now: Any, where: str = "dg_timm") -> list[str]:
    """One line for every name or signature that was added, removed or changed."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return [] if was == now else [f"changed  {where}: {was} is now {now}"]
    found = []
    for key in sorted(was.keys() | now.keys()):
        place = where if key in ("members", "kind", "signature", "bases", "decorators", "type") else f"{where}.{key}"
        if key not in now:
            found.append(f"removed  {place}")
        elif key not in was:
            found.append(f"added    {place}")
        else:
            found += differences(was[key], now[key], place)
    return found


if __name__ == "__main__":
    changes = differences(frozen_api() if FILE.exists() else {}, public_api())
    atomic_write(FILE, json.dumps(public_api(), indent=2) + "\n")
    print("\n".join(changes) or "no change")
