"""What the processes of a job say to each other, through the key-value store that JAX has for them.

The store lives in process 0 (JAX's coordination service), so nothing here needs a shared disk, and
a device only where JAX itself does. Every process makes the same calls in the same order; each call
has a number, which keeps their keys apart.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from typing import Any

from selfrag_jax.errors import UserError

_PART = 2**20  # bytes of a value in the store
_POLL_MS = 1000  # a wait that is longer would not notice signals


class Group:
    """This process among those of its job; alone (the default) every exchange is a no-op."""

    def __init__(self, index: int = 0, count: int = 1, client: Any = None):
        self.index, self.count = index, count
        self.hosts = [""] * count  # names of the machines
        self._client, self._calls = client, 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the artifacts."""
        return self.index == 0

    def name(self, index: int) -> str:
        return f"process {index}" + (f" ({self.hosts[index]})" if self.hosts[index] else "")

    # ---- exchanges -------------------------------------------------------------------------------
    def gather(self, what: str, value: Any) -> list[Any]:
        """Returns the JSON values of all processes, in their order, to every process."""
        if self.count == 1:
            return [value]
        key = self._next_key(what)
        self._put(f"{key}/{self.index}", value)
        return [value if i == self.index else self._get(f"{key}/{i}") for i in range(self.count)]

    def to_main(self, what: str, value: Any) -> list[Any]:
        """Returns the JSON values of all processes to process 0, and nothing to the others."""
        if self.count == 1:
            return [value]
        key = self._next_key(what)
        if not self.is_main:
            self._put(f"{key}/{self.index}", value)
            return []
        others = range(1, self.count)
        return [value, *(self._get(f"{key}/{i}", delete=True) for i in others)]

    def from_main(self, what: str, make: Callable[[], Any]) -> Any:
        """Returns what `make` returns in process 0, JSON data, to every process.

        The others wait for it, however long it takes; they never call `make`.
        """
        if self.count == 1:
            return make()
        key = self._next_key(what)
        if not self.is_main:
            return self._get(key)
        value = make()
        self._put(key, value)
        return value

    def barrier(self, what: str) -> None:
        """Waits until every process is here."""
        self.gather(what, None)

    def require_same(self, what: str, value: Any, remedy: str) -> None:
        """Raises UserError, in every process, naming the first process with another value."""
        for i, other in enumerate(values := self.gather(what, value)):
            if other != values[0]:
                raise UserError(
                    f"--distributed: {self.name(i)} has {what} than {self.name(0)}; {remedy}"
                )

    # ---- the store -------------------------------------------------------------------------------
    def _next_key(self, what: str) -> str:
        self._calls += 1
        return f"selfrag/{self._calls}/{what.replace('/', '_')}"

    def _put(self, key: str, value: Any) -> None:
        data = zlib.compress(json.dumps(value, ensure_ascii=False).encode(), 1)
        starts = range(0, len(data), _PART)
        for i, start in enumerate(starts):
            self._client.key_value_set_bytes(f"{key}.{i}", data[start : start + _PART])
        self._client.key_value_set(f"{key}.parts", str(len(starts)))  # last: it is complete

    def _get(self, key: str, delete: bool = False) -> Any:
        num_parts = int(self._wait_for(f"{key}.parts"))
        names = [f"{key}.{i}" for i in range(num_parts)]
        data = b"".join(self._client.blocking_key_value_get_bytes(n, 60_000) for n in names)
        for name in names if delete else ():
            self._client.key_value_delete(name)
        return json.loads(zlib.decompress(data).decode())

    def _wait_for(self, key: str) -> str:
        """Waits for a key without an end; a process that is gone is the watch's concern."""
        while True:
            try:
                return self._client.blocking_key_value_get(key, _POLL_MS)
            except RuntimeError as e:
                if "DEADLINE_EXCEEDED" not in str(e):
                    raise
                time.sleep(0)  # lets signal handlers run


_group = Group()


def current() -> Group:
    """Returns the group that this process has joined, or one of itself alone."""
    return _group


def set_current(group: Group) -> None:
    global _group
    _group = group
