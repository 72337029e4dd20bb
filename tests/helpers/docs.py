"""Read Markdown pages, and run what their code blocks show.

A page is executed as a reader would: its Python blocks run in order in one namespace and in an empty folder.

- A `text` block right after a Python block is what that block prints.
- A block after `<!-- network -->` talks to the Hub: it runs against the loopback Hub of the tests, where `your-name` is
  its user.
- A block after `<!-- from PATH -->` quotes a file of the repository, and must be found there.
- The commands of a `bash` block are not run at full length: each is turned into something cheap that fails when its
  script, target, extra or an option does not exist.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

from tests.helpers.scripts import ROOT, execute

NETWORK = "<!-- network -->"
OWNER = "your-name"  # in documents; the user of the loopback Hub in tests
_NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d*(?:e-?\d+)?")
_LAUNCHERS = {"torchrun", "accelerate", "srun"}
_TOOLS = {"ruff", "mypy", "pytest", "lint-imports", "mkdocs"}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; ``line`` is the one of its opening fence."""

    language: str
    code: str
    line: int
    is_network: bool
    quotes: str | None  # path of the file that it quotes
    follows: str  # the text between it and the block before it


def pages() -> list[Path]:
    """Every page for readers: the README, docs/, and the READMEs and results that the site shows, too."""
    beside = ("README.md", "CHANGELOG.md", "results/*.md", "train_scripts/**/README.md", "hub_cards/README.md")
    return sorted({*(ROOT / "docs").rglob("*.md"), *(path for pattern in beside for path in ROOT.glob(pattern))})


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks of a page, in order."""
    found: list[Block] = []
    between: list[str] = []
    fence: str | None = None
    code: list[str] = []
    start = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        opening = re.fullmatch(r"(`{3,})([\w-]*)\s*", line)
        if fence is None and opening:
            fence, language, start, code = opening[1], opening[2], number, []
        elif fence is not None and line.rstrip() == fence:
            follows = "\n".join(between).strip()
            quoted = re.search(r"<!-- from (\S+) -->\Z", follows)
            found.append(
                Block(
                    language,
                    "\n".join(code) + "\n",
                    start,
                    follows.endswith(NETWORK),
                    quoted[1] if quoted else None,
                    follows,
                )
            )
            fence, between = None, []
        else:
            (between if fence is None else code).append(line)
    assert fence is None, f"{page}:{start}: the block has no end"
    return found


def run_page(page: Path, folder: Path, owner: str | None = None) -> int:
    """Execute the Python blocks of a page in ``folder``; compare what they print with the `text` blocks after them.

    Args:
        owner: user of the loopback Hub, in place of ``your-name``; None leaves out the blocks that need a Hub.

    Returns:
        The number of blocks that were executed.
    """
    namespace: dict[str, object] = {"__name__": "__page__"}
    listed = blocks(page)
    ran = 0
    with contextlib.chdir(folder):
        for block, after in zip(listed, [*listed[1:], None], strict=True):
            if block.language != "python" or block.quotes or (block.is_network and owner is None):
                continue
            code = block.code.replace(OWNER, owner) if owner and block.is_network else block.code
            where = f"{page.relative_to(ROOT)}:{block.line}"
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * block.line + code, str(page), "exec"), namespace)
            shown = after.code if after and after.language == "text" and not after.follows else ""
            assert_prints(printed.getvalue(), shown, where)
            ran += 1
    return ran


def assert_prints(printed: str, shown: str, where: str) -> None:
    """Equal text; a number with a decimal point may differ in the third digit, as another processor rounds."""
    if not shown:
        assert not printed, f"{where} prints this, and the page does not show it:\n{printed}"
        return

    def skeleton(text: str) -> list[str]:
        return [" ".join(line.split()) for line in _NUMBER.sub("#.#", text).strip().splitlines()]

    assert skeleton(printed) == skeleton(shown), f"{where} prints\n{printed}and the page shows\n{shown}"
    for got, expected in zip(_NUMBER.findall(printed), _NUMBER.findall(shown), strict=True):
        assert abs(float(got) - float(expected)) <= 0.005 * max(abs(float(expected)), 0.1), (
            f"{where}: {got}, {expected}"
        )


def commands(block: Block) -> list[list[str]]:
    """The commands of a bash block, as words; comments, variables in front and continuation lines are resolved."""
    text = block.code.replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        for part in re.split(r"\s+&&\s+", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                del words[0]
            if words:
                found.append(words)
    return found


def check_command(words: list[str]) -> None:
    """Fail unless the command of a document could run: see the docstring of this module."""
    program = Path(words[0]).name
    if program == "make":
        process = execute(["make", "-n", *words[1:]], cwd=ROOT)
        assert process.returncode == 0, process.stderr
    elif program == "pip":
        _check_requirements(words[1:])
    elif program in ("bash", "sbatch"):
        process = execute(["bash", "-n", str(ROOT / words[1])])
        assert process.returncode == 0, process.stderr
    elif program in _LAUNCHERS:
        script = next(k for k, word in enumerate(words) if word.endswith(".py"))
        _check_options(words[script], words[script + 1 :])
    elif program in _TOOLS:
        assert all((ROOT / word).exists() for word in words[1:] if word.startswith(("tests/", "docs/", "dg_timm/")))
    elif program == "dg-timm":
        _check_options(f"dg-timm {words[1]}", words[2:])
    elif program.startswith("python"):
        _check_python(words[1:])
    else:
        assert (program, *words[1:2]) in {("git", "clone"), ("hf", "auth"), ("cd", "dg-timm")}, f"unknown: {words}"


def _check_python(words: list[str]) -> None:
    if words[0] != "-m":
        _check_options(words[0], words[1:])
    elif words[1] == "pip":
        _check_requirements(words[2:])
    else:
        assert words[1] in ("venv", "build", "pytest"), words


def _check_requirements(words: list[str]) -> None:
    """``pip install`` of this package: its extras exist."""
    assert words[0] == "install", words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words[1:]:
        named = re.search(r"\[(.+)\]", word)
        for extra in named[1].split(",") if named else ():
            assert extra in extras, f"{word}: pyproject.toml has the extras {sorted(extras)}"


def _check_options(script: str, words: list[str]) -> None:
    """Every option of the command is one that ``--help`` lists; a recipe is there."""
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of(script)))
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert option in known, f"{script} has no {option}"
    if "--recipe" in words:
        name = words[words.index("--recipe") + 1]
        folder = ROOT / "dg_timm" / "recipes" / ("detection" if "detect" in script else "")
        assert (folder / f"{name}.yaml").is_file(), f"no recipe {name}"


@cache
def help_of(script: str) -> str:
    """What ``--help`` of a script (a path in the repository) or of ``dg-timm COMMAND`` prints; run in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit), mock.patch.dict(os.environ):
        if script.startswith("dg-timm "):
            from dg_timm_cli import main

            main([script.split()[1], "--help"])
        else:
            with mock.patch.object(sys, "argv", [script, "--help"]):
                runpy.run_path(str(ROOT / script), run_name="__main__")
    assert "--help" in printed.getvalue(), f"{script} --help prints nothing"
    return printed.getvalue()


def links(page: Path) -> Iterator[tuple[int, str]]:
    """(line, target) of every link and picture of a page outside code."""
    text = re.sub(r"^(`{3,})[\w-]*\s*\n.*?^\1\s*$", lambda m: "\n" * m[0].count("\n"), page.read_text(encoding="utf-8"),
                  flags=re.DOTALL | re.MULTILINE)  # fmt: skip
    for number, line in enumerate(text.splitlines(), start=1):
        for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            yield number, target


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    in_code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        in_code ^= line.startswith("```")
        heading = None if in_code else re.fullmatch(r"#+\s+(.+?)\s*#*", line)
        if heading:
            text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading[1])
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return found
