"""What makes a checkpoint intact: a record of fingerprints, checked by every reader.

The `data` item of a checkpoint is a JSON record: the position of the data iterator, the fingerprint
of every array, and a SHA-256 of both. Readers compare the arrays with it. They pass over a damaged
checkpoint with a warning and read the one before it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from selfrag_jax.checkpoints.orbax_errors import silence_secondary_errors
from selfrag_jax.checkpoints.workdirs import checkpoint_folder
from selfrag_jax.errors import UserError

T = TypeVar("T")


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was saved."""


def make_record(position: dict[str, Any], fingerprints: dict[str, int]) -> dict[str, Any]:
    """The `data` item of a checkpoint: both arguments and their hash."""
    row = {"position": position, "fingerprints": fingerprints}
    return row | {"sha256": hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()}


def write_record(
    workdir: str | Path, step: int, position: dict[str, Any], fingerprints: dict[str, int]
) -> None:
    """Replaces the record of a saved checkpoint, for a writer that knows fingerprints only then."""
    _record_file(workdir, step).write_text(json.dumps(make_record(position, fingerprints)))


def read_record(workdir: str | Path, step: int) -> tuple[dict[str, Any], dict[str, int]]:
    """(position of the data iterator, fingerprints). Raises an error when the record is damaged."""
    file = _record_file(workdir, step)
    row = json.loads(file.read_text())
    if row != make_record(row["position"], row["fingerprints"]):
        raise DamagedCheckpoint(f"{file} is not what was written")
    return row["position"], row["fingerprints"]


def _record_file(workdir: str | Path, step: int) -> Path:
    return checkpoint_folder(workdir, step) / "data" / "metadata"


def compare_fingerprints(
    actual: dict[str, int], expected: dict[str, int], prefix: str = ""
) -> None:
    """Raises DamagedCheckpoint naming the first array that differs.

    prefix: only those of `expected` whose name begins so are compared.
    """
    expected = {path: value for path, value in expected.items() if path.startswith(prefix)}
    for path in sorted(actual.keys() | expected.keys()):
        if actual.get(path) != expected.get(path):
            raise DamagedCheckpoint(f"the bits of {path} are not those that were saved")


def latest_intact(
    steps: Sequence[int], workdir: str | Path, read: Callable[[int], T]
) -> tuple[int, T]:
    """The latest of `steps` (not empty) whose checkpoint is intact, and what `read(step)` returned.

    `read` raises for a damaged checkpoint; each one passed over is reported by a warning. Raises
    UserError when all are damaged, and OSError when the file system fails.
    """
    silence_secondary_errors()
    damaged = []
    for step in sorted(steps, reverse=True):
        folder = checkpoint_folder(workdir, step)
        try:
            result = read(step)
        except Exception as e:  # Orbax and tensorstore raise many types
            if other := non_corruption_error(e, folder):
                raise other from e
            damaged.append(f"{folder}: {first_line(e)}")
            continue
        for line in damaged:
            print(f"warning: {line}; step {step} is taken instead", file=sys.stderr)
        return step, result
    raise UserError(f"no checkpoint can be read, all seem damaged: {'; '.join(damaged)}")


def non_corruption_error(e: Exception, path: Path) -> Exception | None:
    """The error to raise when reading failed for a reason other than damage, else None.

    Other reasons: memory of the device or host is exhausted, the disk does not respond, or the user
    has something else to fix.
    """
    code = re.search(r"os_error_code='(\d+)'", str(e))
    if code and int(code.group(1)) != errno.ENOENT:
        return OSError(f"{path}: {os.strerror(int(code.group(1)))}")
    other_reasons = (jax.errors.JaxRuntimeError, MemoryError, OSError, UserError)
    return e if isinstance(e, other_reasons) and not isinstance(e, FileNotFoundError) else None


def first_line(e: Exception) -> str:
    """The first line of an error's message, cut to 300 characters, or else the error's type."""
    return (str(e).splitlines() or [type(e).__name__])[0][:300]
