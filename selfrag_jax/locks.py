"""Exclusive locks on files and folders, among the processes of one machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from selfrag_jax.errors import UserError
from selfrag_jax.storage.paths import as_path, is_remote

LOCK = ".lock"  # a separate file: one that is rewritten and renamed would lose its lock


def lock_file(file: IO, what: str | Path, wait_for: str = "") -> None:
    """Takes an exclusive lock on `file` until close or exit.

    Raises UserError, which calls it `what`, if another process holds the lock; with `wait_for`,
    what the other one does, it waits instead. A no-op on systems and file systems without locks.
    """
    try:
        import fcntl
    except ImportError:  # not Unix
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait_for:
            print(f"{what}: waits for another process, which is {wait_for}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
            return
        raise UserError(
            f"{what}: another process is writing it; wait until it ends, or choose another name"
        ) from None
    except OSError:
        return


@contextmanager
def exclusive_workdir(folder: str | Path, wait_for: str = "") -> Iterator[None]:
    """Holds an exclusive lock on a folder, which is created if missing, within the block.

    It is removed again if the block raises UserError before it wrote anything.
    Raises UserError if another process holds the lock, or waits for it, as `lock_file` does.
    """
    path = as_path(folder) / LOCK
    if is_remote(path):  # a bucket has no locks
        yield
        return
    new = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as f:
        lock_file(f, folder, wait_for)
        try:
            yield
        except UserError:
            if new and [p.name for p in path.parent.iterdir()] == [LOCK]:
                path.unlink()  # nothing was written
                for made in new:
                    with suppress(OSError):  # not empty
                        made.rmdir()
            raise
