"""A hook of MkDocs: pages of the repository outside docs/ become pages of the site, and links become those of the site.

Every link in a page is relative to its place in the repository, so that it works in an editor and on a code host. The
README is the start page. A link to a file that the site does not have (code, JSON) is shown as its path.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = (
    "CHANGELOG.md", "hub_cards/README.md", "results/*.md", "results/**/*.png", "train_scripts/README.md",
    "train_scripts/experiments/README.md",
)  # fmt: skip
START = "README.md"  # shown as index.md
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages and pictures outside docs/, at the path that they have in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / START)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Turn the links of one page, outside its code blocks, into links of the site."""
    here = _in_repository(page.file.src_uri)
    parts = re.split(r"(^```.*?^```\s*$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else _LINK.sub(lambda match: _relinked(match, here, page, files), part)
        for part in parts
    )


def _relinked(match: re.Match[str], here: str, page: Any, files: Files) -> str:
    picture, text, link = match.groups()
    if re.match(r"[a-z]+:|#", link):
        return match[0]
    path, hash_, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    site = "index.md" if target == START else target.removeprefix("docs/")
    if files.get_file_from_path(site) is None:
        if not (ROOT / target).exists():
            return match[0]  # MkDocs reports it
        return text if f"`{target}`" in text or target in text else f"{text} (`{target}`)"
    relative = posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or ".")
    return f"{picture}[{text}]({relative}{hash_}{anchor})"


def _in_repository(src_uri: str) -> str:
    """Where in the repository a page of the site comes from."""
    if src_uri == "index.md":
        return START
    return src_uri if (ROOT / src_uri).is_file() else f"docs/{src_uri}"
