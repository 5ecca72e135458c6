"""Silences Orbax's secondary errors.

When a checkpoint cannot be read or written, Orbax raises one error, which is enough. Its threads
also log their tracebacks, asyncio logs Orbax tasks that nobody awaited, and coroutines that find
their event loop closed are printed: hundreds of lines around the one that matters.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any


def silence_secondary_errors() -> None:
    """Of a checkpoint that cannot be written or read, Orbax logs what each of its threads died of, asyncio what each of Orbax's tasks
    died of that was not waited for, and Orbax prints that others have no one left to tell: hundreds of lines around the one error,
    which is raised besides. They come when they like, so this stays."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_not_of_orbax)
    if getattr(sys.unraisablehook, "func", None) is not _unless_too_late:
        sys.unraisablehook = partial(_unless_too_late, sys.unraisablehook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    if not record.exc_info:
        return True
    where = [
        record.pathname,
        *(frame.f_code.co_filename for frame, _ in traceback.walk_tb(record.exc_info[2])),
    ]
    return not any(f"{os.sep}orbax{os.sep}" in file for file in where)


def _unless_too_late(otherwise: Callable[[Any], None], error: Any) -> None:
    too_late = error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"
    code = getattr(error.object, "cr_code", None)
    if not too_late and not (code and f"{os.sep}orbax{os.sep}" in code.co_filename):
        otherwise(error)
