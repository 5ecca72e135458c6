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


LFS_POINTER = "is a pointer of Git LFS in place of the file; fetch the file: git lfs pull"
# How files begin that are taken for text or for a model by mistake, what they are, and what helps.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/", LFS_POINTER),
    (b"%PDF-", "is a PDF; turn it into text first: pdftotext FILE.pdf"),
    (b"PAR1", "is a Parquet file; turn it into JSON lines first, for example with pandas"),
    (b"PK\x03\x04", "is a zip archive, as .docx, .xlsx and .epub are too; unpack or convert it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; uncompress it first: zstd -d FILE"),
    (b"BZh", "is compressed by bzip2; uncompress it first: bunzip2 FILE"),
    (b"\xfd7zXZ\x00", "is compressed by xz; uncompress it first: unxz FILE"),
    (b"SQLite format 3\x00", "is an SQLite database; export its table as CSV first"),
    (b"\x89HDF\r\n", "is an HDF5 file; turn it into JSON lines first"),
)
_GZIP = b"\x1f\x8b"


def kind_by_beginning(path: str | Path) -> str:
    """What a file is, and what helps, where its first bytes tell a kind that is not read here.

    "" for all others, among them files that cannot be opened.
    """
    try:
        with as_path(path).open("rb") as f:
            start = f.read(64)
    except OSError:
        return ""
    return next((kind for first, kind in _BEGINNINGS if start.startswith(first)), "")


def _require_text(path: Any, raw: BinaryIO) -> None:
    """Raises UserError if a file begins as one that holds no text, or is compressed unawares."""
    start = raw.read(len(_GZIP))
    raw.seek(0)
    if path.suffix != ".gz" and start == _GZIP:
        raise UserError(f"{path}: is compressed by gzip; name it {path.name}.gz")
    if path.suffix == ".gz" and start and start != _GZIP:
        raise UserError(f"{path}: is not compressed by gzip; take .gz off its name")
    if kind := kind_by_beginning(path):
        raise UserError(f"{path}: {kind}")


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
        _require_text(path, raw)
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
