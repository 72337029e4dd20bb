"""How a command line ends when something is wrong that its user can mend."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from dg_timm._errors import UserError

P = ParamSpec("P")


def cli_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Print a :class:`dg_timm.UserError` of ``main`` as one line and return 2; anything else keeps its traceback."""

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2

    return guarded
