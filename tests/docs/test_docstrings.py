"""The examples in the docstrings of public functions are executed, offline."""

import doctest
import inspect
import types

import pytest

import dg_timm

OWNER = "your-name"  # in examples; the user of the loopback Hub is ada


def public_functions() -> dict[str, types.FunctionType]:
    """What ``dg_timm.__all__`` names: functions, and the functions of modules that it names."""
    found = {}
    for name in dg_timm.__all__:
        member = getattr(dg_timm, name)
        if inspect.isfunction(member):
            found[name] = member
        elif name == "kernels":
            own = [f for n, f in vars(member).items() if not n.startswith("_") and inspect.isfunction(f)]
            found |= {f"kernels.{f.__name__}": f for f in own if f.__module__ == member.__name__}
    return found


FUNCTIONS = public_functions()


def test_there_are_functions():
    assert {"dynamize", "adjacency", "cost", "save_pretrained"} <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example_that_runs(name, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    function = inspect.unwrap(FUNCTIONS[name])
    text = (inspect.getdoc(function) or "").replace(OWNER, "ada")
    example = doctest.DocTestParser().get_doctest(text, {}, name, inspect.getsourcefile(function), 0)
    assert example.examples, f"dg_timm.{name} has no example (>>>) in its docstring"
    shown: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    results = runner.run(example, out=shown.append)
    assert not results.failed, "".join(shown)
