"""The kernels' library: compiled once and safely, refused where it can't be trusted, and what the user is told."""

import gc

import pytest
import timm
import torch

import dg_timm
from dg_timm._errors import UserError
from dg_timm.execution import allocator, backends
from dg_timm.execution.backends import cpu
from tests.helpers.forks import fork_each
from tests.helpers.networks import randomize, randomize_graph
from tests.helpers.scripts import python

ADDS_UP = """
import warnings, torch
from dg_timm.execution import operators
from dg_timm.graph import edges
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    maps, weights = [torch.randn(2, 3, 4, 4) for _ in range(3)], torch.rand(2, 3)
    for _ in range(3):
        torch.testing.assert_close(operators.weighted_sum(maps, weights), edges.weighted_sum(maps, weights))
print(sum("aggregation" in str(w.message) for w in caught), *[str(w.message) for w in caught])
"""
COMPILES = """
import dg_timm
from dg_timm._errors import UserError
try:
    found = dg_timm.kernels.compile()
    print(found.backend, *found.dtypes)
except UserError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def libraries(tmp_path):
    """The libraries in the cache of a test."""
    return lambda: sorted(path for path in (tmp_path / "cache" / "dg_timm").iterdir() if path.suffix != ".lock")


@pytest.fixture
def cache(tmp_path):
    return dict(XDG_CACHE_HOME=str(tmp_path / "cache"))


def test_importing_compiles_nothing(tmp_path, cache):
    done = python("-W", "error", "-c", "import dg_timm.execution.backends.cpu", env={**cache, "CC": "no-such-compiler"})
    assert "no-such-compiler" not in done.stderr
    assert not (tmp_path / "cache" / "dg_timm").exists()


def test_a_compiler_makes_one_library(tmp_path, cache, libraries):
    assert fork_each(ADDS_UP, [cache], tmp_path / "first") == ["0"]
    (library,) = libraries()
    assert library.suffix == ".so"
    stamp = library.stat().st_mtime_ns
    damage = f"open({str(library)!r}, 'wb').write(b'damaged')"
    again, damaged, mended = fork_each(
        f"import os\nif 'DAMAGE' in os.environ:\n    {damage}\n{ADDS_UP}",
        [cache, {**cache, "DAMAGE": "1"}, cache],
        tmp_path / "again",
    )
    assert again == damaged == mended == "0"
    assert len(library.read_bytes()) > 1000
    assert library.stat().st_mtime_ns != stamp
    assert libraries() == [library]


def test_without_a_compiler_it_falls_back_and_says_so_once(tmp_path, cache):
    (tmp_path / "bin").mkdir()
    variables = [dict(PATH=str(tmp_path / "bin")), dict(CC="no-such-compiler"), dict(CC="false")]
    off = dict(CC="no-such-compiler", DG_TIMM_KERNELS="0")
    *said, silent = fork_each(ADDS_UP, [{**cache, **own} for own in (*variables, off)], tmp_path / "runs")
    for own, text in zip(variables, said, strict=True):
        assert text.startswith("1 aggregation runs on PyTorch's own operations"), (own, text)
        assert "DG_TIMM_KERNELS=0 silences this" in text
    assert silent == "0"


def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path, cache):
    folder = tmp_path / "cache" / "dg_timm"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert fork_each(ADDS_UP, [cache], tmp_path / "runs") == ["0"]
    assert list(folder.iterdir()) == []


def test_eight_processes_that_start_at_once_compile_one_library(tmp_path, cache, libraries):
    """Each finds no library; one compiles, the others wait, and every prediction is right."""
    model = randomize_graph(randomize(timm.create_model("dg_cifar_resnet20"))).requires_grad_(False)
    x = torch.randn(2, 3, 32, 32)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    (tmp_path / "compilers").mkdir()
    compiler = tmp_path / "cc"  # one that says who called it, and takes its time
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ touch {tmp_path}/compilers/$$; sleep 2; }}\nexec cc "$@"\n',
        encoding="utf-8",
    )
    compiler.chmod(0o755)
    program = f"""
import warnings, torch, dg_timm
warnings.simplefilter("error", RuntimeWarning)
model, x, wanted = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    assert torch.equal(model(x), wanted)
print(dg_timm.kernels.status().backend)
"""
    found = fork_each(program, [{**cache, "CC": str(compiler)}] * 8, tmp_path / "runs", at_once=True)
    assert found == ["c"] * 8
    (library,) = libraries()
    assert library.suffix == ".so"
    assert len(list((tmp_path / "compilers").iterdir())) == 1


# --------------------------------------------------------------------------- what the user asks and is told


def test_status_says_what_runs(monkeypatch):
    found = dg_timm.kernels.status()
    assert (found.device, found.backend) == ("cpu", "c")
    assert found.dtypes == tuple(sorted(str(dtype).removeprefix("torch.") for dtype in cpu.load().dtypes))
    assert {"float32", "float64"} <= set(found.dtypes)
    assert dg_timm.kernels.status(torch.device("cpu")) == found
    assert dg_timm.kernels.status("meta").backend == "torch"
    monkeypatch.setattr(cpu, "load", lambda: None)
    found = dg_timm.kernels.status()
    assert (found.backend, found.dtypes) == ("torch", ())
    assert backends.kernels_for(torch.ones(1)) is None


def test_memory_that_is_kept_is_counted_and_released():
    held = allocator.empty_like(torch.empty(1, 2**21))
    del held
    gc.collect()
    assert dg_timm.kernels.status().cached_bytes >= 2**23
    assert dg_timm.kernels.release_memory() >= 2**23
    assert dg_timm.kernels.status().cached_bytes == dg_timm.kernels.release_memory() == 0
    assert dg_timm.kernels.status("meta").cached_bytes == 0


def test_compiled_ahead_the_first_prediction_finds_its_library(tmp_path, cache, libraries):
    (told,) = fork_each(COMPILES, [cache], tmp_path / "ahead")
    assert told.split()[0] == "c"
    assert {"float32", "float64"} <= set(told.split())
    (library,) = libraries()
    stamp = library.stat().st_mtime_ns
    assert fork_each(ADDS_UP, [cache], tmp_path / "later") == ["0"]
    assert library.stat().st_mtime_ns == stamp
    assert dg_timm.kernels.compile().backend == dg_timm.kernels.status().backend == "c"


def test_what_can_not_be_compiled_is_an_error_that_says_why(tmp_path, cache):
    variables = [dict(CC="no-such-compiler"), dict(CC="false"), dict(DG_TIMM_KERNELS="0")]
    missing, failing, off = fork_each(COMPILES, [{**cache, **own} for own in variables], tmp_path / "runs")
    assert missing.startswith("BadState the kernels can't be compiled: CC=no-such-compiler not found")
    assert failing.startswith("BadState the kernels can't be compiled: ")
    assert "false" in failing
    assert off.startswith("BadState ")
    assert "DG_TIMM_KERNELS=0 turns them off" in off


def test_a_device_without_kernels_is_an_error_when_they_are_asked_for():
    with pytest.raises(UserError, match="there are no kernels for meta"):
        dg_timm.kernels.compile("meta")
