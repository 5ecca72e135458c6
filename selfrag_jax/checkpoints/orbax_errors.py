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

_ORBAX = f"{os.sep}orbax{os.sep}"  # in the path of every source file of Orbax


def silence_secondary_errors() -> None:
    """Silences Orbax's secondary errors. They can arrive late, so the filter stays installed."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_is_not_from_orbax)
    if getattr(sys.unraisablehook, "func", None) is not _unraisable_hook:
        sys.unraisablehook = partial(_unraisable_hook, sys.unraisablehook)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    """A logging filter: drops tracebacks that were logged by Orbax or pass through it."""
    if not record.exc_info:
        return True
    frames = traceback.walk_tb(record.exc_info[2])
    files = [record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
    return not any(_ORBAX in file for file in files)


def _unraisable_hook(original_hook: Callable[[Any], None], error: Any) -> None:
    """Drops errors of Orbax's coroutines and of closed event loops; passes on all others."""
    loop_closed = error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"
    code = getattr(error.object, "cr_code", None)
    if not loop_closed and not (code and _ORBAX in code.co_filename):
        original_hook(error)
