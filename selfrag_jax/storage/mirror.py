"""Copies of files in a bucket: fetched before a command reads them, sent while it writes.

A `Mirror` stands for one file or folder in a bucket. `pull` fetches what has changed there; `push`
sends what has changed here, manifests last, so that an artifact in a bucket is finished when its
manifest is there. An object appears in a bucket whole or not at all, so nothing is renamed there.

The copies are kept between runs (copies.py), with a record of what the bucket had, and checked by
their MD5 where the bucket knows it.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.storage import paths
from selfrag_jax.storage.copies import (
    Synced,
    local_name,
    local_version,
    md5_fits,
    remote_version,
    whole,
)

SECONDS_BETWEEN_PUSHES = 30.0
_PARALLEL = 8  # transfers at a time
_RECORD = ".remote.json"
_PROBE = ".selfrag-write-test"
# Names of what is being written, and of what concerns this machine alone.
_NEVER_SENT = (".tmp", ".lock", "-wal", "-shm", _RECORD)
_BEING_WRITTEN = "orbax-checkpoint-tmp"


class NotSent(OSError):
    """Results could not be sent to a bucket; the message says where they are on this machine."""


class Mirror:
    """A file or folder in a bucket and its copy on this machine, `path`.

    A file brings what lies beside it under a name that begins with its own (manifest, scores, parts
    of an unfinished one), and the folders `beside`. sends: the names that `push` sends, as fnmatch
    has them. Raises as `paths.explained` says if the bucket cannot be asked.
    """

    def __init__(self, address: str, sends: str = "*", beside: tuple[str, ...] = ()):
        self.address, self.sends, self._beside = paths.check_address(address), sends, beside
        self.path = local_name(self.address)
        self._fs = paths.open_file_system(self.address)
        self._lock = threading.Lock()
        with self._explained():
            self._fs.invalidate_cache()
            self.exists = bool(self._fs.exists(self.address))
            self._is_folder_there = self.exists and bool(self._fs.isdir(self.address))
        self._record = self.path.with_name(f".{self.path.name}{_RECORD}")
        self.synced: dict[str, Synced] = {}  # by name, relative to the folder
        if self._record.is_file():
            rows = json.loads(self._record.read_text(encoding="utf-8"))
            self.synced = {name: Synced(**row) for name, row in rows.items()}

    @property
    def is_folder(self) -> bool:
        """As in the bucket; one that is not there yet is what the command makes of it."""
        return self._is_folder_there if self.exists else self.path.is_dir()

    @property
    def _folder(self) -> Path:
        """The folder that is compared with the bucket's; of a file, the one that it lies in."""
        return self.path if self.is_folder else self.path.parent

    @property
    def _remote_folder(self) -> str:
        return self.address if self.is_folder else self.address.rpartition("/")[0]

    def _counts(self, name: str) -> bool:
        """Whether a file belongs to this mirror and is one to exchange."""
        parts = name.split("/")
        if any(part.endswith(_NEVER_SENT) or _BEING_WRITTEN in part for part in parts):
            return False
        stem = f"{self.path.name.removesuffix(self.path.suffix)}."
        is_ours = f"{parts[0].lstrip('.')}.".startswith(stem) or parts[0] in self._beside
        return self.is_folder or is_ours

    # ---- fetching --------------------------------------------------------------------------------
    def pull(self, must_exist: bool = True) -> Path:
        """Fetches what is new or changed in the bucket; returns the path of the copy.

        What was changed here and not there since the last exchange is kept. Raises UserError if
        there is nothing or no access, and OSError if the bucket fails.
        """
        if self.exists and self.is_folder and self.path.is_file():
            self.path.unlink()  # was a file there before
        with self._explained():
            if must_exist and not self.exists:
                raise FileNotFoundError(self.address)
            there = self._listed()
            self._folder.mkdir(parents=True, exist_ok=True)
            wanted = [name for name, info in there.items() if self._is_newer_there(name, info)]
            with ThreadPoolExecutor(_PARALLEL) as pool:
                for _ in pool.map(lambda name: self._fetch(name, there[name]), wanted):
                    pass
        for name in set(self.synced) - set(there):  # was removed from the bucket
            file = self._folder / name
            if file.is_file() and not self._is_changed_here(name):
                file.unlink()
            del self.synced[name]
        self._write_record()
        return self.path

    def _listed(self) -> dict[str, dict[str, Any]]:
        """The bucket's files, by name relative to the folder."""
        prefix = self._fs._strip_protocol(self._remote_folder)
        found: dict[str, dict[str, Any]] = {}
        if self.is_folder:
            found = self._fs.find(self._remote_folder, detail=True)
        elif self._fs.isdir(self._remote_folder):
            for row in self._fs.ls(self._remote_folder, detail=True):
                name = row["name"].rstrip("/")
                if row["type"] == "file":
                    found[name] = row
                elif self._counts(name[len(prefix) + 1 :]):
                    found |= self._fs.find(name, detail=True)
        named = {name[len(prefix) + 1 :]: info for name, info in found.items()}
        return {n: info for n, info in named.items() if n and self._counts(n)}

    def _is_newer_there(self, name: str, info: dict[str, Any]) -> bool:
        file, known = self._folder / name, self.synced.get(name)
        if not file.is_file():
            return True
        if known and known.remote == remote_version(info):
            return False
        if known is None and file.stat().st_size == info["size"] and md5_fits(file, info):
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
                if md5_fits(temporary, info):
                    break
                if attempt == 2:
                    raise OSError(f"{name} arrived with another hash than the bucket states")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        self._note(name, info)

    def _note(self, name: str, info: dict[str, Any]) -> None:
        self.synced[name] = Synced(remote_version(info), *local_version(self._folder / name))

    # ---- sending ---------------------------------------------------------------------------------
    def check_writable(self) -> None:
        """Raises an error if the bucket does not take files, before anything is computed."""
        probe = f"{self.address.rpartition('/')[0]}/{_PROBE}-{os.getpid()}"
        with self._explained():
            self._fs.pipe_file(probe, b"")
            self._fs.rm_file(probe)

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
                with self._explained():
                    for names in (here - manifests, manifests):
                        with ThreadPoolExecutor(_PARALLEL) as pool:
                            for _ in pool.map(self._send, sorted(names)):
                                pass
                    for name in gone:
                        if self._fs.exists(f"{self._remote_folder}/{name}"):
                            self._fs.rm_file(f"{self._remote_folder}/{name}")
                        del self.synced[name]
            finally:
                self._write_record()
            return len(here)

    def _names(self) -> Iterator[str]:
        if not self._folder.is_dir():
            return
        roots = [self._folder]
        if not self.is_folder:
            yield from (p.name for p in self._folder.iterdir() if self._is_own(p))
            roots = [p for p in self._folder.iterdir() if p.is_dir() and self._counts(p.name)]
        for folder in roots:
            for file in folder.rglob("*"):
                name = file.relative_to(self._folder).as_posix()
                if self._is_here(file, name):
                    yield name

    def _is_here(self, file: Path, name: str) -> bool:
        return self._counts(name) and file.is_file()

    def _is_own(self, file: Path) -> bool:
        """Whether a file beside this one is its companion, and not the copy of another address."""
        other = file != self.path and file.with_name(f".{file.name}{_RECORD}").exists()
        return self._is_here(file, file.name) and not other

    def _is_sent(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self.sends)

    def _is_changed_here(self, name: str) -> bool:
        known = self.synced.get(name)
        try:
            version = local_version(self._folder / name)
        except FileNotFoundError:
            return False
        return known is None or (known.size, known.modified_ns) != version

    def _send(self, name: str) -> None:
        file, there = self._folder / name, f"{self._remote_folder}/{name}"
        try:
            version = local_version(file)
            with whole(file) as sent:
                self._fs.put_file(str(sent), there)
        except FileNotFoundError:
            if file.exists():
                raise
            return  # renamed meanwhile: its new name is sent
        self._fs.invalidate_cache()
        self.synced[name] = Synced(remote_version(self._fs.info(there)), *version)

    def _write_record(self) -> None:
        rows = {name: asdict(one) for name, one in sorted(self.synced.items())}
        self._record.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._record.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(rows), encoding="utf-8")
        os.replace(temporary, self._record)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            raise paths.explained(e, self.address) from e


# ---- while a command writes ----------------------------------------------------------------------
@contextmanager
def pushed_regularly(mirrors: Iterable[Mirror]) -> Iterator[None]:
    """Sends what the block has written, every half minute and at its end, however it ends.

    A push in between that fails is tried again the next time; one at the end raises NotSent. What
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
    failed: list[tuple[Mirror, Exception]] = []
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
                failed.append((mirror, e))
        if failed:
            kept = ", ".join(str(mirror.path) for mirror, _ in failed)
            error = failed[0][1]
            raise NotSent(
                f"{error}. What was made is kept in {kept}; the same command sends it"
            ) from error


_pushed: list[Mirror] = []  # within `pushed_regularly`


def push_now() -> None:
    """Sends what has been written so far, if anything is sent. Raises OSError as `push` does."""
    for mirror in _pushed:
        mirror.push()
