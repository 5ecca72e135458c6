"""Paths on this machine and in a bucket (gs://), one interface for both.

Files in a bucket are read and written in place by `as_path`, where a whole file at a time is enough
(training workdirs), or through a copy on this machine (mirror.py), where it is not.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError

# gs:// is what this package is made and tested for; s3:// works as far as fsspec and s3fs do.
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*):/{1,2}(?=[^/])", re.IGNORECASE)
_LOCAL_FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
    errno.EISDIR,
)  # fmt: skip
_BUCKET_IS_MISSING = "no such bucket, or no access to it"


def is_remote(path: Any) -> bool:
    """Whether `path` is an address, `gs://bucket/name`, and not a file of this machine."""
    return "://" in str(path)


def check_address(address: str) -> str:
    """Returns an address without a slash at its end. Raises UserError if its kind is unknown."""
    scheme, _, rest = address.partition("://")
    if scheme not in _PACKAGES:
        known = ", ".join(f"{s}://" for s in _PACKAGES)
        raise UserError(f"{address}: files are not read from {scheme}://; known: {known}")
    bucket, _, name = rest.strip("/").partition("/")
    if not bucket or not name:
        raise UserError(f"{address}: expected {scheme}://BUCKET/NAME")
    return f"{scheme}://{bucket}/{name}"


def as_path(path: str | Path) -> Path:
    """Returns a path to read and write with: pathlib's, or etils' for an address.

    Both have the same methods; a path in a bucket has no `resolve`, `samefile` or `absolute`.
    """
    if not is_remote(path):
        return Path(path)
    from etils import epath

    open_file_system(str(path))  # says what is missing
    return epath.Path(check_address(str(path)))  # type: ignore[return-value]


def absolute(path: str | Path) -> Path:
    """Returns the absolute path; an address is one."""
    return as_path(path) if is_remote(path) else Path(path).absolute()


def open_file_system(address: str) -> Any:
    """Returns fsspec's file system of an address. Raises UserError if its package is missing."""
    scheme = check_address(address).partition("://")[0]
    # Else gcsfs asks what kind of bucket it is, which needs rights that a reader need not have, and
    # prints its failure before every request.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in _PACKAGES.values():
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError:
        package = _PACKAGES[scheme]
        raise UserError(
            f"{address}: {scheme}:// is read by {package}, which is not installed; "
            f"pip install {package}"
        ) from None


def explained(error: Exception, address: str) -> Exception:
    """Returns the error to raise in place of one that a request to a bucket raised.

    UserError where there is no such object, or no access to it; OSError where the bucket or the
    network failed, after several tries; other errors as they are.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _LOCAL_FAULTS:
        return OSError(
            f"{address}: cannot be copied to this machine ({os.strerror(error.errno)}: "
            f"{error.filename or 'its cache'}); XDG_CACHE_HOME chooses another disk"
        )
    if isinstance(error, FileNotFoundError):
        return UserError(f"{address}: no such file or folder, or {_BUCKET_IS_MISSING}")
    denied = isinstance(error, PermissionError) or str(error).startswith("Forbidden")
    if denied or getattr(error, "code", None) in (401, 403):
        return UserError(
            f"{address}: access denied ({_first_line(error)}); log in with `gcloud auth "
            "application-default login`, or give this machine's account the right to read and "
            "write objects there (roles/storage.objectUser)"
        )
    module = type(error).__module__.partition(".")[0]
    if isinstance(error, OSError) or module in ("gcsfs", "aiohttp", "google", "s3fs", "botocore"):
        return OSError(f"{address}: the request failed, after several tries ({_first_line(error)})")
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
