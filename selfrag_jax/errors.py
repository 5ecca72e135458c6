"""Errors that the command line prints as one line, without a traceback."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


class UserError(ValueError):
    """An error the user can fix: a wrong flag, file or value. Exit status 2."""


# What a reader does with a row that it cannot use. Returning, it leaves the row out.
OnError = Callable[[UserError], None]


def raise_error(error: UserError) -> None:
    """The OnError of most readers: the first row that cannot be used ends the reading."""
    raise error


class StageFailed(RuntimeError):
    """A correct command had a negative outcome, such as a program too large. Exit status 1."""


def library(name: str, user: str, extra: str) -> Any:
    """Imports a module that an extra of setup.py brings. user: what needs it, "MAUVE", say.

    Raises UserError with the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError as e:
        package = (e.name or name).partition(".")[0]
        raise UserError(
            f"{user} needs {package}, which is not installed: pip install 'selfrag-jax[{extra}]'"
        ) from None
