"""Copies of files in a bucket: fetched before a command reads them, sent while it writes.

A `Mirror` stands for one file or folder in a bucket. `pull` fetches what has changed there; `push`
sends what has changed here, manifests last, so that an artifact in a bucket is finished when its
manifest is there. An object appears in a bucket whole or not at all, so nothing is renamed there.

The copies are kept between runs under `root()`, with a record of what the bucket had, and checked
by their MD5 where the bucket knows it.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.storage import paths

SECONDS_BETWEEN_PUSHES = 30.0
_PARALLEL = 8  # transfers at a time
_RECORD = ".remote.json"
_PROBE = ".selfrag-write-test"
# Names of what is being written, and of what concerns this machine alone.
_NEVER_SENT = (".tmp", ".lock", "-wal", "-shm", _RECORD)
_BEING_WRITTEN = "orbax-checkpoint-tmp"


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


@dataclass
class _Synced:
    """What a file was, there and here, when both were the same."""

    remote: str  # the bucket's hash or version of it
    size: int  # bytes
    modified_ns: int


@dataclass
class Mirror:
    """A file or folder in a bucket and its copy on this machine.

    A file brings those beside it whose names begin with its own: manifest, scores, parts.
    """

    address: str
    sends: str = "*"  # the names that `push` sends, as fnmatch has them
    synced: dict[str, _Synced] = field(default_factory=dict)  # by name, relative to the folder

    def __post_init__(self) -> None:
        self.address = paths.check_address(self.address)
        self.path = local_name(self.address)
        self._fs = paths.open_file_system(self.address)
        self._lock = threading.Lock()
        try:
            there = self._exists()
            # One that does not exist yet counts as a file if its name has a suffix.
            self.is_folder = self._fs.isdir(self.address) if there else not self.path.suffix
        except Exception as e:
            raise paths.explained(e, self.address) from e
        # The folder that is compared with the bucket, and the start of the names that count.
        self._folder = self.path if self.is_folder else self.path.parent
        self._stem = "" if self.is_folder else f"{self.path.name.removesuffix(self.path.suffix)}."
        self._remote_folder = self.address if self.is_folder else self.address.rpartition("/")[0]
        self._record = self._folder.parent / f".{self._folder.name}{_RECORD}"
        if self._record.is_file():
            rows = json.loads(self._record.read_text(encoding="utf-8"))
            self.synced = {name: _Synced(**row) for name, row in rows.items()}

    def _exists(self) -> bool:
        return bool(self._fs.exists(self.address))

    # ---- fetching --------------------------------------------------------------------------------
    def pull(self, must_exist: bool = True) -> Path:
        """Fetches what is new or changed in the bucket; returns the path of the copy.

        What was changed here and not there since the last exchange is kept. Raises UserError if
        there is nothing or no access, and OSError if the bucket fails.
        """
        if self.path.is_file() and self.is_folder:
            self.path.unlink()  # was a file there before
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            there = self._listed()
            if must_exist and not self._exists():
                raise FileNotFoundError(self.address)
            wanted = [name for name, info in there.items() if self._is_newer_there(name, info)]
            with ThreadPoolExecutor(_PARALLEL) as pool:
                for _ in pool.map(lambda name: self._fetch(name, there[name]), wanted):
                    pass
        except Exception as e:
            raise paths.explained(e, self.address) from e
        for name in set(self.synced) - set(there):  # was removed from the bucket
            file = self._folder / name
            if file.is_file() and not self._is_changed_here(name):
                file.unlink()
            del self.synced[name]
        self._write_record()
        return self.path

    def _listed(self) -> dict[str, dict[str, Any]]:
        """The bucket's files, by name relative to the folder."""
        self._fs.invalidate_cache()
        prefix = self._fs._strip_protocol(self._remote_folder)
        if self.is_folder:
            found = self._fs.find(self._remote_folder, detail=True)
        else:
            rows = self._fs.ls(self._remote_folder, detail=True) if self._has_folder() else []
            found = {row["name"]: row for row in rows if row["type"] == "file"}
        named = {name[len(prefix) + 1 :]: info for name, info in found.items()}
        return {n: info for n, info in named.items() if n and self._counts(n)}

    def _has_folder(self) -> bool:
        return bool(self._fs.isdir(self._remote_folder))

    def _counts(self, name: str) -> bool:
        """Whether a file belongs to this mirror and is one to exchange."""
        if any(part.endswith(_NEVER_SENT) or _BEING_WRITTEN in part for part in name.split("/")):
            return False
        return f"{name.lstrip('.')}.".startswith(self._stem)

    def _is_newer_there(self, name: str, info: dict[str, Any]) -> bool:
        file, known = self._folder / name, self.synced.get(name)
        if not file.is_file():
            return True
        if known and known.remote == _version(info):
            return False
        if known is None and file.stat().st_size == info["size"] and _md5_fits(file, info):
            self._note(name, info)
            return False
        if self._is_changed_here(name):
            kept = file.with_name(f"{file.name}.kept-{time.time_ns()}")
            file.rename(kept)
            print(f"{file}: changed here and in the bucket; kept as {kept}", file=sys.stderr)
        return True

    def _fetch(self, name: str, info: dict[str, Any]) -> None:
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            for attempt in (1, 2):
                self._fs.get_file(f"{self._remote_folder}/{name}", str(temporary))
                if _md5_fits(temporary, info):
                    break
                if attempt == 2:
                    raise OSError(f"{name} arrived with another hash than the bucket states")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        self._note(name, info)

    # ---- sending ---------------------------------------------------------------------------------
    def check_writable(self) -> None:
        """Raises an error if the bucket does not take files, before anything is computed."""
        probe = f"{self._remote_folder}/{_PROBE}-{os.getpid()}"
        try:
            self._fs.pipe_file(probe, b"")
            self._fs.rm_file(probe)
        except Exception as e:
            raise paths.explained(e, self.address) from e

    def push(self) -> int:
        """Sends what is new or changed here; returns the number of files.

        Manifests are sent after all others. What was removed here is removed there. Raises OSError
        if the bucket does not take them; they are kept here, and the next push sends them.
        """
        with self._lock:
            here = {n for n in self._names() if self._is_sent(n) and self._is_changed_here(n)}
            gone = [n for n in self.synced if self._is_sent(n) and not (self._folder / n).is_file()]
            manifests = {name for name in here if name.endswith("manifest.json")}
            try:
                for names in (here - manifests, manifests):
                    with ThreadPoolExecutor(_PARALLEL) as pool:
                        for _ in pool.map(self._send, sorted(names)):
                            pass
                for name in gone:
                    if self._fs.exists(f"{self._remote_folder}/{name}"):
                        self._fs.rm_file(f"{self._remote_folder}/{name}")
                    del self.synced[name]
            except Exception as e:
                raise paths.explained(e, self.address) from e
            finally:
                self._write_record()
            return len(here)

    def _names(self) -> Iterator[str]:
        files: Iterable[Path] = self._folder.rglob("*") if self.is_folder else ()
        if not self.is_folder and self._folder.is_dir():
            files = self._folder.iterdir()
        for file in files:
            name = file.relative_to(self._folder).as_posix()
            if self._counts(name) and file.is_file():
                yield name

    def _is_sent(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self.sends)

    def _is_changed_here(self, name: str) -> bool:
        known = self.synced.get(name)
        try:
            stat = (self._folder / name).stat()
        except FileNotFoundError:
            return False
        return known is None or (known.size, known.modified_ns) != (stat.st_size, stat.st_mtime_ns)

    def _send(self, name: str) -> None:
        file, there = self._folder / name, f"{self._remote_folder}/{name}"
        try:
            stat = file.stat()
            self._fs.put_file(str(file), there)
        except FileNotFoundError:
            if file.exists():
                raise
            return  # renamed meanwhile: its new name is sent
        self._fs.invalidate_cache()
        version = _version(self._fs.info(there))
        self.synced[name] = _Synced(version, stat.st_size, stat.st_mtime_ns)

    # ---- the record ------------------------------------------------------------------------------
    def _note(self, name: str, info: dict[str, Any]) -> None:
        stat = (self._folder / name).stat()
        self.synced[name] = _Synced(_version(info), stat.st_size, stat.st_mtime_ns)

    def _write_record(self) -> None:
        rows = {name: asdict(one) for name, one in sorted(self.synced.items())}
        temporary = self._record.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(rows), encoding="utf-8")
        os.replace(temporary, self._record)


def _version(info: dict[str, Any]) -> str:
    """What changes when an object does: its hash or, where the bucket has none, its version."""
    for name in ("md5Hash", "crc32c", "ETag", "etag", "generation", "mtime"):
        if info.get(name):
            return str(info[name])
    return str(info.get("size"))


def _md5_fits(file: Path, info: dict[str, Any]) -> bool:
    if not info.get("md5Hash"):
        return file.stat().st_size == info["size"]
    with open(file, "rb") as f:
        found = hashlib.file_digest(f, "md5").digest()
    return base64.b64encode(found).decode() == info["md5Hash"]


@contextmanager
def pushed_regularly(mirrors: Iterable[Mirror]) -> Iterator[None]:
    """Sends what the block has written, every half minute and at its end, however it ends.

    A push in between that fails is tried again the next time; one at the end raises OSError. What
    could not be sent is kept on this machine, and the same command sends it.
    """
    mirrors, done = list(mirrors), threading.Event()
    _pushed.extend(mirrors)

    def push_now_and_then() -> None:
        while not done.wait(SECONDS_BETWEEN_PUSHES):
            for mirror in mirrors:
                try:
                    mirror.push()
                except (OSError, UserError) as e:
                    print(f"{e}; will be tried again", file=sys.stderr)

    thread = threading.Thread(target=push_now_and_then, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        del _pushed[len(_pushed) - len(mirrors) :]
        for mirror in mirrors:
            try:
                mirror.push()
            except (OSError, UserError) as e:
                raise OSError(
                    f"{e}. What was made is kept in {mirror.path}; the same command sends it"
                ) from e


_pushed: list[Mirror] = []  # within `pushed_regularly`


def push_now() -> None:
    """Sends what has been written so far, if anything is sent. Raises OSError as `push` does."""
    for mirror in _pushed:
        mirror.push()
