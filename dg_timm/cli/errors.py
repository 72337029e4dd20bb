"""How every command ends: the one place that turns an exception into an exit status."""

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

from dg_timm._errors import CommandStopped, UserError

P = ParamSpec("P")
# What the system refuses, and a user can mend
_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}


def cli_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Turn what ``main`` raises into an exit status.

    2 and one line for a :class:`dg_timm.UserError` and for what the system refuses (no permission, a full disk); the
    status of a :class:`dg_timm._errors.CommandStopped`; 130 after Ctrl-C. Anything else is a defect and keeps its
    traceback. With ``--debug`` (or DG_TIMM_DEBUG=1) everything does.
    """

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (UserError, CommandStopped, OSError, KeyboardInterrupt) as error:
            if os.environ.get("DG_TIMM_DEBUG"):
                raise
            status, line = _ending(error)
            if line:
                print(line, file=sys.stderr, flush=True)
            return status

    return guarded


def _ending(error: BaseException) -> tuple[int, str]:
    """Give the exit status and the line of an exception; raise it again if it is a defect."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped"
    if isinstance(error, CommandStopped):
        return error.status, str(error)
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in _REFUSALS):
        return 2, f"error: {error}"
    if isinstance(error, BrokenPipeError):  # `dg-timm list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141, ""
    raise error
