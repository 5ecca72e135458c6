"""Errors that the command line prints as one line, without a traceback."""


class UserError(ValueError):
    """An error the user can fix: a wrong flag, file or value. Exit status 2."""


class StageFailed(RuntimeError):
    """A correct command had a negative outcome, such as a program too large. Exit status 1."""
