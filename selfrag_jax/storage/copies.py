"""Where the copies of a bucket's files are on this machine, and how they are compared."""

from __future__ import annotations

import base64
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfrag_jax.storage import paths

_SQLITE, _WAL = ".sqlite3", "-wal"


def root() -> Path:
    """Returns the folder of all copies on this machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "selfrag_jax" / "remote"


def local_name(address: str) -> Path:
    """Returns where an address is copied to."""
    scheme, _, rest = paths.check_address(address).partition("://")
    return root() / scheme / rest


def is_copy(path: str | Path) -> bool:
    """Whether a path is the copy of an address, on this machine alone."""
    return root() in Path(path).parents


def with_addresses(text: str) -> str:
    """Returns a message with the names that the user knows: addresses in place of their copies."""
    for scheme in ("gs", "s3"):
        text = text.replace(f"{root() / scheme}/", f"{scheme}://")
    return text


@dataclass(frozen=True)
class Synced:
    """What a file was, there and here, when both were the same."""

    remote: str  # the bucket's hash or version of it
    size: int  # bytes
    modified_ns: int


def remote_version(info: dict[str, Any]) -> str:
    """What changes when an object does: its hash or, where the bucket has none, its version."""
    for name in ("md5Hash", "crc32c", "ETag", "etag", "generation", "mtime"):
        if info.get(name):
            return str(info[name])
    return str(info.get("size"))


def local_version(file: Path) -> tuple[int, int]:
    """Returns (bytes, time of the last change in ns) of a file.

    What a database has not yet written into its file counts. Raises FileNotFoundError.
    """
    stat = file.stat()
    size, modified_ns = stat.st_size, stat.st_mtime_ns
    if file.suffix == _SQLITE and (log := file.with_name(file.name + _WAL)).is_file():
        stat = log.stat()
        size, modified_ns = size + stat.st_size, max(modified_ns, stat.st_mtime_ns)
    return size, modified_ns


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yields a file to send: itself, or a consistent copy of a database that is being written."""
    if file.suffix != _SQLITE:
        yield file
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        yield copy


def md5_fits(file: Path, info: dict[str, Any]) -> bool:
    """Whether a file has the bucket's hash or, where it states none, the size."""
    if not info.get("md5Hash"):
        return file.stat().st_size == info["size"]
    with open(file, "rb") as f:
        found = hashlib.file_digest(f, "md5").digest()
    return base64.b64encode(found).decode() == info["md5Hash"]
