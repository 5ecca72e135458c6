"""Reads and writes whole files. A file is written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from selfrag_jax.errors import UserError
from selfrag_jax.storage.paths import as_path, is_remote


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Opens a temporary file next to `path`; renames it to `path` if the block succeeds.

    For an address the temporary file is on this machine: an object appears whole or not at all.
    """
    path = as_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            with atomic_write(Path(folder) / "file", mode) as f:
                yield f
            path.write_bytes((Path(folder) / "file").read_bytes())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as f:
        f.write(text)


def write_json(path: str | Path, data: Any) -> None:
    with atomic_write(path) as f:
        json.dump(data, f, indent=2, ensure_ascii=False)
        f.write("\n")


def read_json(path: str | Path) -> Any:
    """Returns the content of a JSON file. Raises UserError if it is missing or not valid JSON."""
    try:
        return json.loads(as_path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected a file") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON: {e}") from None


def read_object(path: str | Path, fields: tuple[str, ...]) -> dict[str, Any]:
    """Returns a JSON object of ours. Raises UserError if it is damaged or lacks a field."""
    row = read_json(path)
    if not isinstance(row, dict) or (missing := [f for f in fields if f not in row]):
        what = f"lacks {missing[0]!r}" if isinstance(row, dict) else "is not an object"
        raise UserError(f"{path}: {what}; it is damaged, make its folder again")
    return row


def not_utf8(path: str | Path, e: UnicodeDecodeError) -> UserError:
    """Returns the error of a text file in another encoding, with its line and what converts it."""
    path = as_path(path)
    if path.suffix == ".gz":
        remedy = "uncompress it and convert it with iconv"
    else:
        with path.open("rb") as f:
            start = f.read(4096)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            remedy = f"convert it: iconv -f UTF-16 -t UTF-8 {path}"
        elif b"\0" in start:
            remedy = "is it a text file at all? If not, take it out"
        else:
            remedy = f"if it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 {path}"
    line = _line_that_is_not_utf8(path)
    return UserError(f"{path}:{line}: not UTF-8 ({e.reason}); {remedy}")


@contextmanager
def open_text(path: str | Path, newline: str | None = None) -> Iterator[tuple[TextIO, BinaryIO]]:
    """Opens a UTF-8 text file, decompressed if its name ends in .gz.

    Yields the text and the file below it, whose `tell` says how many bytes on disk were read.
    Raises UserError if the file is missing, not UTF-8, or damaged; also while the block reads.
    """
    path = as_path(path)
    if not path.is_file():
        what = "is a folder; expected a file" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}")
    with path.open("rb") as raw:
        binary = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            with io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline) as text:
                yield text, raw
        except UnicodeDecodeError as e:
            raise not_utf8(path, e) from None
        except EOFError:
            raise UserError(f"{path}: is cut off; copy or download it again") from None
        except (gzip.BadGzipFile, zlib.error) as e:
            raise UserError(f"{path}: not readable as gzip ({e})") from None


def _line_that_is_not_utf8(path: Any) -> int:
    """The number of the first one. Text is decoded in pieces, so its error does not tell."""
    number = 0
    with path.open("rb") as raw:
        for line in gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw:
            number += 1
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    return number


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link, or a copy across file systems."""
    try:
        os.link(source.resolve(), target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
            raise
        shutil.copyfile(source, target)


def link_or_copy_tree(source: Path, target: Path) -> None:
    """Makes the folder `target` hold the same files as `source`, as `link_or_copy` does."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        if path.is_dir():
            (target / path.relative_to(source)).mkdir(parents=True, exist_ok=True)
        else:
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, target / path.relative_to(source))
