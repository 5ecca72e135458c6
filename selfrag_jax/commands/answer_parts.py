"""The unfinished answers of a file: kept as they come, by each process for itself.

`.{out}.{identity}.partial` holds those of one process, `.{out}.{identity}.1-of-4.partial` those of
the second of four. Whoever continues reads all that its disk has, whatever their number.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from selfrag_jax import locks
from selfrag_jax.processes.group import Group
from selfrag_jax.progress import progress
from selfrag_jax.records import Question

if TYPE_CHECKING:
    from selfrag_jax.answering.answerer import Answerer
    from selfrag_jax.answering.records import Answer
    from selfrag_jax.profiling import Profile

Row = dict[str, Any]
PARTIAL_FILES = "*.partial"
_SECONDS = "seconds"  # in the rows of an unfinished file: since the answer before


class AnswerParts:
    """The partial files of the answers `out`, and what the processes of a job tell of theirs."""

    def __init__(self, out: Path, identity: str, group: Group):
        """identity: of the settings and inputs; files of others are left alone."""
        self._out, self._group = out, group
        self._stem = f".{out.name}.{identity}"
        self._of_job = [self._file(i, group.count) for i in range(group.count)]
        self.own = self._of_job[group.index]
        self._sends: set[str] = set()  # answers of earlier runs that this process tells of

    def open(self) -> IO[str]:
        """Opens this process's file to add to it. Raises UserError if another run has it open."""
        self.own.parent.mkdir(parents=True, exist_ok=True)
        f = open(self.own, "a", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
        try:
            locks.lock_file(f, self._out)
        except BaseException:
            f.close()
            raise
        return f

    def read_others(self) -> dict[str, Row]:
        """Returns the answers of all partial files on this disk, by id, without those that failed.

        To be called before any process of the job adds to its own.
        """
        _truncate_last_line(self.own)
        rows = (row for file in self._files() for row in _complete_rows(file))
        done = {row["id"]: row for row in rows if not row.get("error")}
        self._group.barrier("partial answers are read")
        return done

    def left(self, ids: Sequence[str], done: dict[str, Row]) -> set[str]:
        """Returns this process's share of the questions that no process has an answer to.

        Every n-th of those, from its own index on.
        """
        found = self._group.gather("answered", list(done))
        everywhere: set[str] = set()
        for i, some in enumerate(found):
            if i == self._group.index:
                self._sends = set(some) - everywhere
            everywhere |= set(some)
        rest = [i for i in ids if i not in everywhere]
        return set(rest[self._group.index :: self._group.count])

    def collect(self, done: dict[str, Row], mine: set[str]) -> tuple[list[Row], tuple[float, int]]:
        """Returns the answers of all processes and the time they took, to process 0.

        done: this process's, with those of earlier runs. mine: the ids that it has answered itself.
        The time is the sum over the processes, in seconds, and of how many answers.
        """
        files = [self.own]
        if self._group.is_main:
            files += [file for file in self._files() if file not in self._of_job]
        measured = [
            row[_SECONDS]
            for file in files
            for row in _complete_rows(file)
            if not row["error"] and _SECONDS in row
        ]
        rows = [
            {k: v for k, v in row.items() if k != _SECONDS}
            for i, row in done.items()
            if i in mine or i in self._sends
        ]
        sent = self._group.to_main("answers", [rows, sum(measured), len(measured)])
        times = sum(s for _, s, _ in sent), sum(n for _, _, n in sent)
        return [row for some, _, _ in sent for row in some], times

    def remove(self) -> None:
        """Removes all partial files of these answers; `out` is finished."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _file(self, index: int, count: int) -> Path:
        which = f".{index}-of-{count}" if count > 1 else ""
        return self._out.with_name(f"{self._stem}{which}.partial")

    def _files(self) -> list[Path]:
        return sorted(self._out.parent.glob(f"{self._stem}*.partial"))


def _truncate_last_line(partial: Path) -> None:
    """Cuts off an incomplete last line, as left by a kill."""
    data = partial.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(partial, data.rfind(b"\n") + 1)


def _complete_rows(partial: Path) -> list[Row]:
    try:
        data = partial.read_bytes()
    except FileNotFoundError:  # another process has just finished, and removed it
        return []
    lines = data[: data.rfind(b"\n") + 1].decode().split("\n")
    return [json.loads(line) for line in lines if line]


# ---- answering -----------------------------------------------------------------------------------
def answer_rest(
    f: IO[str],
    rag: Answerer,
    questions: Sequence[Question],
    done: dict[str, Row],
    changes: dict[str, Any],
    total: int,
    traced: Profile,
) -> None:
    """Answers the questions; adds each to `done` and to the file at once.

    total: of the file, which decides how many are searched at a time. traced: each answer is a
    step. In the file, a row has the seconds since the answer before it. They are no part of the
    answer: equal runs write equal files.
    """
    watch = _Stopwatch()
    with progress("answer", len(questions) + len(done), "questions", len(done)) as bar:

        def keep(answer: Answer) -> None:
            done[answer.id] = answer.to_row()
            line = done[answer.id] | {_SECONDS: watch.lap()}
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
            f.flush()
            bar.advance()
            traced.step(len(done))

        rag.answer(list(questions), on_answer=keep, total=total, **changes)


class _Stopwatch:
    """Measures the seconds between calls of `lap`, without those that compiling took."""

    def __init__(self) -> None:
        self._last = self._now()

    def _now(self) -> float:
        from selfrag_jax.engine import engine

        return time.perf_counter() - sum(seconds for _, seconds in engine.compiled)

    def lap(self) -> float:
        last, self._last = self._last, self._now()
        return self._last - last
