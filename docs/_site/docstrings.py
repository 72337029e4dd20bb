"""An extension of griffe: docstrings of this package as the API reference needs them.

Sphinx's roles (``:func:`x```) become code, and examples become code blocks. What a function returns gets its annotation
in front, because griffe takes the words before the first colon for the type.
"""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_RETURNS = re.compile(r"^((?:Returns|Yields):\n\s+)(?=\S)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package before they are parsed."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Visit everything in the package."""
        self._visit(pkg)

    def _visit(self, member: Any) -> None:
        if member.is_alias:
            return
        if member.docstring:
            text = _ROLE.sub(r"`\1`", member.docstring.value)
            text = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", text)
            annotation = getattr(member, "returns", None) if member.is_function else None
            if annotation is not None:
                text = _RETURNS.sub(lambda match: f"{match[1]}{annotation}: ", text)
            member.docstring.value = text
        for child in getattr(member, "members", {}).values():
            self._visit(child)
