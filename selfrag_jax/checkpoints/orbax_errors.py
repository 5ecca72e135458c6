"""Silences Orbax's secondary errors.

When a checkpoint cannot be read or written, Orbax raises one error, which is enough. Its threads
also log their tracebacks, asyncio logs tasks and futures of theirs that nobody awaited, coroutines
that never ran are warned of, and those that find their event loop closed are printed: hundreds of
lines around the one that matters. Which of them appear depends on timing.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

_ORBAX = f"{os.sep}orbax{os.sep}"  # in the path of every source file of Orbax


def silence_secondary_errors() -> None:
    """Silences Orbax's secondary errors. They can arrive late, so the filter stays installed."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_is_not_from_orbax)
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    if getattr(sys.unraisablehook, "func", None) is not _unraisable_hook:
        sys.unraisablehook = partial(_unraisable_hook, sys.unraisablehook)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    """A logging filter: drops errors that were logged by Orbax, pass through it, or come from C++.

    The error of a tensorstore future is made in C++, so that it has no traceback.
    """
    if not record.exc_info:
        return True
    if record.name == "asyncio" and record.exc_info[2] is None:
        return False
    frames = traceback.walk_tb(record.exc_info[2])
    files = [record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
    return not any(_ORBAX in file for file in files)


def _unraisable_hook(original_hook: Callable[[Any], None], error: Any) -> None:
    """Drops errors of Orbax's coroutines and of closed event loops; passes on all others."""
    loop_closed = error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"
    code = getattr(error.object, "cr_code", None)
    if not loop_closed and not (code and _ORBAX in code.co_filename):
        original_hook(error)
