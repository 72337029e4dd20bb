"""Pages of the documentation: code runs, commands exist, links lead somewhere, and the site builds."""

import inspect
import pkgutil
import re
import tomllib
import warnings
from pathlib import Path

import pytest
import yaml

import dg_timm
from tests.helpers.docs import ROOT, Block, anchors, blocks, check_command, commands, links, pages, run_page
from tests.helpers.scripts import python

DOCS = ROOT / "docs"


def programs(page: Path) -> list[Block]:
    """The blocks of a page that are executed."""
    return [block for block in blocks(page) if block.language == "python" and not block.quotes]


PROGRAMS = [page for page in pages() if page.is_relative_to(DOCS) and programs(page)]
COMMANDS = sorted(
    {
        tuple(words)
        for page in pages()
        if page != ROOT / "README.md"
        for block in blocks(page)
        if block.language == "bash"
        for words in commands(block)
    }
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PROGRAMS, ids=name)
def test_python_blocks_print_what_the_page_shows(page, tmp_path, hub):
    with warnings.catch_warnings():
        if page.name == "hub.md":
            warnings.simplefilter("ignore")  # of the other libraries that it shows
        assert run_page(page, tmp_path, owner="ada") == len(programs(page))


def test_there_are_programs_and_commands():
    """The tests above and below would be empty otherwise."""
    assert len(PROGRAMS) >= 5
    assert len(COMMANDS) >= 20


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_exists_with_its_options(words):
    check_command(list(words))


@pytest.mark.parametrize("page", pages(), ids=name)
def test_blocks_name_a_language_that_is_known(page):
    unknown = {b.language for b in blocks(page)} - {"python", "bash", "text", "bibtex", "toml"}
    assert not unknown, f"{page}: nobody would check {unknown}"


def test_quoted_code_is_the_code_of_today():
    quotes = [block for page in pages() for block in blocks(page) if block.quotes]
    assert quotes
    for block in quotes:
        lines = [line.strip() for line in (ROOT / block.quotes).read_text(encoding="utf-8").splitlines()]
        quoted = [line.strip() for line in block.code.splitlines()]
        assert any(lines[k : k + len(quoted)] == quoted for k in range(len(lines))), (
            f"{block.quotes} has no\n{block.code}"
        )


def test_the_architecture_shows_the_layers_of_the_contract():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (rooms,) = [c for c in pyproject["tool"]["importlinter"]["contracts"] if c["id"] == "rooms"]
    shown = [block.code.splitlines() for block in blocks(DOCS / "architecture.md") if block.language == "text"]
    assert rooms["layers"] in shown
    folders = {path.name for path in (ROOT / "dg_timm").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(re.findall(r"^  (\w+)/", "\n".join(shown[0]), re.MULTILINE))


@pytest.mark.parametrize("page", pages(), ids=name)
def test_links_lead_somewhere(page):
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page}:{line}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page}:{line}: {target} is none of {sorted(anchors(found))}"


@pytest.mark.parametrize("page", pages(), ids=name)
def test_names_and_files_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    for dotted in set(re.findall(r"\bdg_timm(?:\.[A-Za-z_]\w*)+", text)):
        assert pkgutil.resolve_name(dotted) is not None  # raises if there is no such name
    for path in set(re.findall(r"`((?:dg_timm|tests|docs|train_scripts|results)/[\w./-]+)`", text)):
        assert (ROOT / path).exists(), f"{page}: there is no {path}"


def test_the_navigation_lists_every_page_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w/-]+\.md", str(config["nav"]))
    assert len(listed) == len(set(listed))
    of_docs = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    of_repository = {page.relative_to(ROOT).as_posix() for page in pages() if not page.is_relative_to(DOCS)}
    assert set(listed) == of_docs | (of_repository - {"README.md"}) | {"index.md"}


def test_the_pages_are_in_american_english():
    british = re.compile(r"\b(?:colour|neighbour|behaviour|\w+(?:al|im|gan|cogn)is(?:e|ed|es|ing|ation))\w*\b", re.I)
    for page in pages():
        words = set(british.findall(page.read_text(encoding="utf-8")))
        assert not words, f"{page}: {words}"


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """In strict mode: a link, an anchor, a page or an object of the API reference that is missing is an error."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    process = python("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site", cwd=ROOT)
    assert process.returncode == 0, process.stdout + process.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    shown = {name for name in dg_timm.__all__ if f'id="dg_timm.{name}"' in reference}
    assert shown == {name for name in dg_timm.__all__ if not inspect.ismodule(getattr(dg_timm, name))} - {"__version__"}
    assert ":func:" not in reference


def test_the_reference_names_every_public_function():
    page = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    public = {name for name in dg_timm.__all__ if not inspect.ismodule(getattr(dg_timm, name))} - {"__version__"}
    assert set(re.findall(r"^::: dg_timm\.(\w+)$", page, flags=re.MULTILINE)) == public
