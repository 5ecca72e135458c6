"""Errors that the command line prints as one line, without a traceback."""

from importlib import import_module
from typing import Any


class UserError(ValueError):
    """An error the user can fix: a wrong flag, file or value. Exit status 2."""


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
