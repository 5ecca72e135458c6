"""The two errors that the command line prints as one line, without a traceback."""


class UserError(ValueError):
    """The user can fix this: a wrong flag, file or value. Exit status 2."""


class StageFailed(RuntimeError):
    """The command ran correctly, and its answer is no. Exit status 1."""
