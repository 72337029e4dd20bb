"""Errors that a user can mend.

Command lines print a :class:`UserError` as one line and exit with status 2. Any other exception is a defect, here or
in a dependency, and keeps its traceback. Each kind is also the built-in exception that a caller would expect.
"""


class UserError(Exception):
    """Base of all errors whose message names the bad value and the fix."""


class BadValue(UserError, ValueError):
    """An argument, option or file content that can't be used."""


class BadType(UserError, TypeError):
    """An argument of another type than the one documented."""


class BadState(UserError, RuntimeError):
    """A call that the model, run or repository is not ready for."""


class MissingPackage(UserError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""


class CommandStopped(Exception):
    """A command that ends before its work is done, and has said why; it is neither a mistake nor a defect.

    Attributes:
        status: exit status of the process.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
