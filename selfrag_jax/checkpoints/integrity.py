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
from typing import Any

import jax

from selfrag_jax.checkpoints.orbax_errors import silence_secondary_errors
from selfrag_jax.checkpoints.workdirs import CHECKPOINTS
from selfrag_jax.errors import UserError


# ---- what makes a checkpoint whole -----------------------------------------------------------------------------------
class Damaged(ValueError):
    """A checkpoint is not what was saved."""


def write_record(file: Path, position: dict[str, Any], prints: dict[str, int]) -> None:
    """The `data` of a checkpoint, for one that is not written by training."""
    file.write_text(json.dumps(_record(position, prints)))


def _record(position: dict[str, Any], prints: dict[str, int]) -> dict[str, Any]:
    row = {"position": position, "fingerprints": prints}
    return row | {"sha256": hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()}


def read_record(workdir: Path, step: int) -> tuple[dict[str, Any], dict[str, int]]:
    """(position of the data iterator, fingerprints) of a checkpoint. Raises ValueError when it is not what was written."""
    file = Path(workdir) / CHECKPOINTS / str(step) / "data" / "metadata"
    row = json.loads(file.read_text())
    if row != _record(row["position"], row["fingerprints"]):
        raise Damaged(f"{file} is not what was written")
    return row["position"], row["fingerprints"]


def _compare(found: dict[str, int], wanted: dict[str, int], item: str = "") -> None:
    """item: compares what begins with this name only."""
    wanted = {path: value for path, value in wanted.items() if path.startswith(item)}
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            raise Damaged(f"the bits of {path} are not those that were saved")


def latest_intact(
    steps: Sequence[int], workdir: str | Path, read: Callable[[int], Any]
) -> tuple[int, Any] | None:
    """The last step whose checkpoint `read` finds whole, and what it read; None when there is no checkpoint.

    Warns of those that are passed over. Raises BadInput when all are damaged, and OSError when the file system fails.
    """
    silence_secondary_errors()
    damaged = []
    for step in sorted(steps, reverse=True):
        try:
            found = read(step)
        except Exception as e:  # Orbax and tensorstore raise many kinds
            if other := non_corruption_error(e, Path(workdir) / CHECKPOINTS / str(step)):
                raise other from e
            damaged.append(f"{Path(workdir) / CHECKPOINTS / str(step)}: {_first_line(e)}")
            continue
        for line in damaged:
            print(f"warning: {line}; step {step} is taken instead", file=sys.stderr)
        return step, found
    if damaged:
        raise UserError(f"no checkpoint can be read, all seem damaged: {'; '.join(damaged)}")
    return None


def non_corruption_error(e: Exception, what: Path) -> Exception | None:
    """The error to raise where reading failed for another reason than damage: a full device, a full host, a disk that does
    not answer, something else for the user to mend. None for damage."""
    code = re.search(r"os_error_code='(\d+)'", str(e))
    if code and int(code.group(1)) != errno.ENOENT:
        return OSError(f"{what}: {os.strerror(int(code.group(1)))}")
    other = (jax.errors.JaxRuntimeError, MemoryError, OSError, UserError)
    return e if isinstance(e, other) and not isinstance(e, FileNotFoundError) else None


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:300]
