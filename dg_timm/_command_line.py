"""What every command line has: the look of its help, and errors in one line that name the nearest option."""

import argparse
import copy
import difflib
import re
from typing import Any, NoReturn


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the default of every option that has one; keep the line breaks of the description."""

    def add_argument(self, action: argparse.Action) -> None:
        """Add an option to the help; one without a default says itself what happens then."""
        if action.default is None or action.default in ([], {}):
            action = copy.copy(action)
            action.default = argparse.SUPPRESS
        super().add_argument(action)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line: no usage of a hundred options before it, the nearest option after it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        """End with exit status 2."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            known = re.findall(r"(?<![\w-])--[a-z][\w-]*", self.format_help())
            near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.6)
            message += f"; the nearest option is {near[0]}" if near else ""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help lists all options)\n")
