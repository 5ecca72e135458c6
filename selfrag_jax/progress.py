"""Progress of long work: a bar with the time left on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_TERMINAL_INTERVAL, _LOG_INTERVAL = 0.2, 15.0  # seconds between two updates
_BAR_WIDTH, _LINE_WIDTH = 24, 110


class Progress:
    """Counts units of work. `advance` redraws at most a few times a second.

    total: 0 if it is not known.
    done: units that an earlier run finished; they do not count towards the rate.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0, shown: bool = True):
        self.name, self.total, self.unit = name, total, unit
        self.done, self.skipped, self.note, self.shown = done, done, "", shown
        self.start = self.last_drawn = time.monotonic()
        self.is_terminal, self.is_drawn = sys.stderr.isatty(), False

    def advance(self, n: int = 1, note: str = "") -> None:
        """Counts n more units. A note replaces the previous one."""
        self.done += n
        self.note = note or self.note
        now = time.monotonic()
        interval = _TERMINAL_INTERVAL if self.is_terminal else _LOG_INTERVAL
        if self.shown and now - self.last_drawn >= interval:
            self.last_drawn = now
            self._draw(now)

    def skip(self, n: int) -> None:
        """Counts n units that an earlier run finished; they do not count towards the rate."""
        self.skipped += n
        self.advance(n)

    def _draw(self, now: float) -> None:
        if not self.total and self.done:
            end = "" if self.is_terminal else "\n"
            self._print(f"{self.name:<22} {self.done} {self.unit}  {self.note}", end=end)
            return
        rate = (self.done - self.skipped) / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        filled = round(_BAR_WIDTH * (self.done / self.total if self.total else 1.0))
        bar = "█" * filled + "·" * (_BAR_WIDTH - filled)
        count = f"{self.done}/{self.total} {self.unit}"
        text = f"{self.name:<22} {bar} {count}  {_clock(left)} left  {self.note}"
        self._print(text, end="" if self.is_terminal else "\n")

    def close(self) -> None:
        """Prints the total and the time it took."""
        if self.shown:
            elapsed = _clock(time.monotonic() - self.start)
            self._print(f"{self.name:<22} {self.done} {self.unit} in {elapsed}  {self.note}")

    def _print(self, text: str, end: str = "\n") -> None:
        self.is_drawn = True
        line = f"\r{text:<{_LINE_WIDTH}}" if self.is_terminal else text
        print(line, end=end, file=sys.stderr, flush=True)


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
    """Yields a Progress and closes it at the end.

    shown: False in all but one of several processes that do the same work together.
    """
    bar = Progress(name, total, unit, done, shown)
    try:
        yield bar
    except BaseException:
        if bar.is_drawn:  # so that the message starts on a new line
            bar.close()
        raise
    bar.close()


def say(name: str, text: str, shown: bool = True) -> None:
    """Prints a line about long work, in the form of its progress."""
    if shown:
        print(f"{name:<22} {text}", file=sys.stderr, flush=True)


@contextmanager
def waiting(name: str, what: str, shown: bool = True) -> Iterator[None]:
    """Says what the block does, and how long it took, if that is more than a second.

    For work without a count, such as compiling. On a terminal the seconds are counted.
    """
    if not shown:
        yield
        return
    start, ended, is_terminal = time.monotonic(), threading.Event(), sys.stderr.isatty()

    def show(seconds: str, end: str) -> None:
        line = f"{name:<22} {what}  {seconds}".rstrip()
        line = f"\r{line:<{_LINE_WIDTH}}" if is_terminal else line
        print(line, end=end, file=sys.stderr, flush=True)

    def count() -> None:
        interval = 1.0
        while not ended.wait(interval):
            seconds = time.monotonic() - start
            show(_clock(seconds) if seconds > 1.5 else "", "" if is_terminal else "\n")
            interval = 1.0 if is_terminal else _LOG_INTERVAL

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    try:
        yield
    finally:
        ended.set()
        counter.join()
        if time.monotonic() - start >= 1:
            show(_clock(time.monotonic() - start), "\n")
