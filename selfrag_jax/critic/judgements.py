"""Judgements on disk: what the critic was asked before is read, not asked again.

A judgement is kept under a hash of the critic, the group and the prompt's token ids, which are all
that it depends on. It is written as soon as its batch of questions is judged, so a killed run loses
the batch at work only. Each process writes a file of its own (SQLite's locks do not hold on every
network disk) and reads those of the others that were there when it started.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from jaxtyping import Float

from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.critic.critic import Critic, CritiquePrompt
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.models.params import flatten
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery

FOLDER = "judgements"
_KEYS_PER_QUERY = 500  # SQLite takes 999 variables in its oldest builds
_PROMPTS_PER_WRITE = 4096
_WAIT = 60.0  # seconds for another process's write
_DIGESTED = 4096  # values of each end of a parameter


def critic_digest(loaded: LoadedModel) -> str:
    """Returns a hash of a model's architecture, and of names, shapes and both ends of all weights.

    It tells one training, checkpoint or conversion from another; it does not prove that they are
    undamaged, which loading does.
    """
    h = hashlib.blake2b(repr(loaded.model.config).encode(), digest_size=8)
    for path, leaf in flatten(loaded.params or {}):
        values = np.asarray(leaf).reshape(-1)
        h.update(f"{path} {np.shape(leaf)} {values.dtype}".encode())
        for end in (values[:_DIGESTED], values[-_DIGESTED:]):
            h.update(np.ascontiguousarray(end).tobytes())
    return h.hexdigest()


class JudgementStore:
    """The judgements of one critic in a folder. `get` and `put` take keys made by `key`."""

    def __init__(self, folder: str | Path, fingerprint: str, shard: tuple[int, int] = (0, 1)):
        """fingerprint: of the critic. shard: (i, n), of this process.

        Raises UserError if a file there is damaged.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{fingerprint}.{shard[0]}-of-{shard[1]}.sqlite3"
        others = sorted(p for p in folder.glob(f"{fingerprint}.*.sqlite3") if p != self._path)
        self._fingerprint = fingerprint
        self._own = _connect(self._path, "rwc")
        with _errors_of(self._path), self._own:
            self._own.execute(
                "CREATE TABLE IF NOT EXISTS judgements (key BLOB PRIMARY KEY, value BLOB) "
                "WITHOUT ROWID"
            )
        self._others = [(path, _connect(path, "ro")) for path in others]

    def key(self, prompt: CritiquePrompt) -> bytes:
        h = hashlib.blake2b(f"{self._fingerprint} {prompt.group} ".encode(), digest_size=16)
        h.update(np.asarray(prompt.ids, np.int32).tobytes())
        return h.digest()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Float[np.ndarray, " n"]]:
        """Returns the judgements that are there, by key."""
        with _errors_of(self._path):
            found = _lookup(self._own, keys)
        for path, database in self._others:
            with _errors_of(path), suppress(sqlite3.OperationalError):
                # Being made, or left by a killed writer: what it holds is judged again.
                found |= _lookup(database, [key for key in keys if key not in found])
        return found

    def put(self, judged: Iterable[tuple[bytes, Float[np.ndarray, " n"]]]) -> None:
        """Writes judgements; all of them or, if the process is killed, none."""
        rows = [(key, np.asarray(p, np.float32).tobytes()) for key, p in judged]
        with _errors_of(self._path), self._own:
            self._own.executemany("INSERT OR REPLACE INTO judgements VALUES (?, ?)", rows)

    def close(self) -> None:
        for database in (self._own, *(database for _, database in self._others)):
            database.close()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    with _errors_of(path):
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(uri, timeout=_WAIT, uri=True)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Raises SQLite's errors as ours: a full or read-only disk, or a damaged file."""
    try:
        yield
    except sqlite3.OperationalError as e:
        raise StageFailed(f"{path}: judgements cannot be stored or read: {e}") from None
    except sqlite3.DatabaseError as e:
        raise UserError(
            f"{path}: not readable as stored judgements ({e}); remove it, and what it held is "
            "judged again"
        ) from None


def _lookup(
    database: sqlite3.Connection, keys: Sequence[bytes]
) -> dict[bytes, Float[np.ndarray, " n"]]:
    found: dict[bytes, np.ndarray] = {}
    for some in _slices(keys, _KEYS_PER_QUERY):
        marks = ",".join("?" * len(some))
        rows = database.execute(f"SELECT key, value FROM judgements WHERE key IN ({marks})", some)
        found |= {key: np.frombuffer(value, np.float32) for key, value in rows}
    return found


class StoredCritic:
    """A critic that looks into a store first. Counts what it looked up and what it asked."""

    def __init__(self, critic: Critic, store: JudgementStore):
        self.critic, self.store = critic, store
        self.num_found, self.num_asked = 0, 0

    def judge(self, queries: Sequence[CritiqueQuery]) -> list[Float[np.ndarray, " n"]]:
        """Returns the distribution over each query's group, as `Critic.judge` does."""
        prompts = self.critic.prompts(queries)
        keys = dict(zip(prompts, map(self.store.key, prompts), strict=True))
        known = self.store.get(list(keys.values()))
        sizes = {group: len(tokens) for group, tokens in reflection.GROUPS.items()}
        missing = [p for p, key in keys.items() if len(known.get(key, ())) != sizes[p.group]]
        self.num_found += len(keys) - len(missing)
        # In batches of equal lengths: the critic sorts by length within each of them.
        missing.sort(key=lambda prompt: (prompt.group, len(prompt.ids)))
        for some in _slices(missing, _PROMPTS_PER_WRITE):
            judged = self.critic.judge_prompts(some)
            new = [(keys[p], value) for p, value in zip(some, judged, strict=True)]
            self.store.put(new)
            known |= dict(new)
            self.num_asked += len(some)
        return [known[keys[p]] for p in prompts]


def _slices(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
