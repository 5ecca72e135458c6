"""Progress of long work: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Counts units of work; `advance` redraws at most a few times a second."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0, shown: bool = True):
        self.name, self.total, self.unit = name, total, unit
        self.done, self.first, self.note, self.shown = done, done, "", shown
        self.start = self.last = time.monotonic()
        self.tty = sys.stderr.isatty()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        now = time.monotonic()
        if self.shown and now - self.last >= (0.2 if self.tty else 15.0):
            self.last = now
            self._draw(now)

    def skip(self, n: int) -> None:
        """Counts work that an earlier run did; it does not count for the time left."""
        self.first += n
        self.advance(n)

    def _draw(self, now: float) -> None:
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        share = self.done / self.total if self.total else 1.0
        bar = "█" * round(24 * share) + "·" * (24 - round(24 * share))
        text = f"{self.name:<22} {bar} {self.done}/{self.total} {self.unit}  {_clock(left)} left  {self.note}"
        print(
            f"\r{text:<110}" if self.tty else text,
            end="" if self.tty else "\n",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if not self.shown:
            return
        elapsed = time.monotonic() - self.start
        text = f"{self.name:<22} {self.done} {self.unit} in {_clock(elapsed)}  {self.note}"
        print(f"\r{text:<110}" if self.tty else text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "--:--"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


@contextmanager
def progress(
    name: str, total: int, unit: str, done: int = 0, shown: bool = True
) -> Iterator[Progress]:
    """shown: False in all but one of several processes that do the same work together."""
    bar = Progress(name, total, unit, done, shown)
    try:
        yield bar
    finally:  # an error starts on a line of its own
        bar.close()
