"""Replies that were paid for, in an SQLite file: nothing is asked, or paid, twice.

Answers are kept by a hash of everything that shapes them (teacher.cache_key) and serve every later
run. Failures are kept too, but belong to the job, which is one output file: an interrupted run does
not ask them again, another job does. Every reply is committed at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfrag_jax import locks
from selfrag_jax.critic.teachers.cost import Measured
from selfrag_jax.critic.teachers.teacher import Usage, Verdict
from selfrag_jax.errors import UserError

_SCHEMA = """
create table if not exists answers (
    key text primary key, teacher text, kind text, token text, explanation text, raw text,
    characters integer, tokens_in integer, tokens_out integer, seconds real
) without rowid;
create table if not exists failures (
    job text, key text, reason text, raw text, primary key (job, key)
) without rowid;
create table if not exists payments (
    job text primary key, tokens_in integer, tokens_out integer
) without rowid;
create index if not exists answers_by_teacher on answers (teacher, kind);
"""


def default_path() -> Path:
    """The file that all runs of a user share."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "selfrag_jax" / "teacher_replies.sqlite3"


def teacher_name(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class ReplyCache:
    """An open cache. job: the output that failures and payments belong to."""

    def __init__(self, connection: sqlite3.Connection, teacher: str, job: str):
        self._db, self.teacher, self.job = connection, teacher, job

    def answer(self, key: str) -> Verdict | None:
        """Returns a kept answer; it has no usage, as it costs nothing any more."""
        query = "select token, explanation, raw from answers where key = ?"
        row = self._db.execute(query, (key,)).fetchone()
        return None if row is None else Verdict(row[0], "", row[1], row[2])

    def failure(self, key: str) -> Verdict | None:
        """Returns why an earlier run of this job got no answer."""
        query = "select reason, raw from failures where job = ? and key = ?"
        row = self._db.execute(query, (self.job, key)).fetchone()
        return None if row is None else Verdict(None, row[0], raw=row[1])

    def store(self, key: str, kind: str, prompt: str, verdict: Verdict) -> None:
        """Keeps an answer or a failure, if there is one, and what was paid, in one commit."""
        used = verdict.usage
        with self._db:
            if verdict.token is not None:
                row = (key, self.teacher, kind, verdict.token, verdict.explanation, verdict.raw)
                numbers = (len(prompt), used.tokens_in, used.tokens_out, verdict.seconds)
                self._db.execute(
                    "insert or ignore into answers values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    row + numbers,
                )
            elif verdict.reason:
                self._db.execute(
                    "insert or replace into failures values (?, ?, ?, ?)",
                    (self.job, key, verdict.reason, verdict.raw),
                )
            self._db.execute(
                "insert into payments values (?, ?, ?) on conflict (job) do update set "
                "tokens_in = tokens_in + excluded.tokens_in, "
                "tokens_out = tokens_out + excluded.tokens_out",
                (self.job, used.tokens_in, used.tokens_out),
            )

    def forget_failures(self, keys: Iterable[str]) -> None:
        """Lets failures of this job be asked again."""
        with self._db:
            self._db.executemany(
                "delete from failures where job = ? and key = ?", [(self.job, k) for k in keys]
            )

    def paid(self) -> Usage:
        """Returns the tokens that all runs of this job paid for."""
        query = "select tokens_in, tokens_out from payments where job = ?"
        return Usage(*(self._db.execute(query, (self.job,)).fetchone() or (0, 0)))

    def measured(self, kind: str) -> Measured:
        """Returns sums over this teacher's answers to a kind of query."""
        query = (
            "select count(*), total(characters), total(tokens_in), total(tokens_out), "
            "total(seconds) from answers where teacher = ? and kind = ?"
        )
        n, *sums, seconds = self._db.execute(query, (self.teacher, kind)).fetchone()
        characters, tokens_in, tokens_out = map(round, sums)
        return Measured(n, characters, tokens_in, tokens_out, seconds)


@contextmanager
def open_cache(path: str | Path, identity: dict[str, Any], job: str) -> Iterator[ReplyCache]:
    """Opens the cache for one teacher and job; two runs of the same teacher exclude each other.

    Raises UserError if the file is no cache, or if another process asks the same teacher.
    """
    path, teacher = Path(path), teacher_name(identity)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --cache is a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.{teacher}.lock"), "ab") as lock:
        # Else both would ask, and pay for, what neither has an answer to yet.
        locks.lock_file(lock, f"{path} (another run asks the same teacher)")
        connection = sqlite3.connect(path, timeout=60)
        try:
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = normal")
            connection.executescript(_SCHEMA)
            yield ReplyCache(connection, teacher, job)
        except sqlite3.DatabaseError as e:
            if isinstance(e, sqlite3.OperationalError):
                raise OSError(f"{path}: {e}") from e
            raise UserError(f"{path}: is no cache of replies ({e}); choose another --cache") from e
        finally:
            connection.close()
