"""What a file consists of: problems, ids, labels, lengths, and rows as a model sees them.

Memory does not grow with the file, but for eight bytes a row to find ids that occur twice.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from selfrag_jax.data.batches import Example, build_example
from selfrag_jax.data.critic_examples import CriticSource
from selfrag_jax.data.file_kinds import FileRow
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.errors import UserError
from selfrag_jax.records import (
    CriticExample,
    GeneratorExample,
    Instruction,
    Passage,
    Question,
)
from selfrag_jax.retrieval.passages import id_hashes
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Tokenizer

MOST_LISTED = 20  # problems
MOST_IDS_LISTED = 100  # ids that are looked for again to name their lines
NUM_SHOWN = 3  # rows


@dataclass(frozen=True)
class ExampleBuilder:
    """Turns a record into the tokens that a model reads, with what it learns of them."""

    tokenizer: Tokenizer
    brief: bool  # the critic's short prompts
    mask: str  # of generator data (data/generator_examples.py)

    def build(self, record: Any) -> Example:
        """Returns a record of any kind as one document."""
        weights = dict.fromkeys(reflection.GROUPS, 1.0)
        if isinstance(record, Instruction):  # its output before `selfrag label`: text alone
            output = prompts.escape_controls(record.output)
            record = GeneratorExample(record.id, record.instruction, output, record.input)
        if isinstance(record, CriticExample):
            return CriticSource([record], self.tokenizer, self.brief, weights).example(0)
        if isinstance(record, GeneratorExample):
            return GeneratorSource([record], self.tokenizer, weights, self.mask).example(0)
        if isinstance(record, Question):
            parts = prompts.question_prompt(record)
        else:
            assert isinstance(record, Passage)
            parts = prompts.passage(record)
        return build_example(self.tokenizer, [(parts, 0.0)], weights)

    def runs(self, example: Example) -> list[tuple[str, bool]]:
        """Returns the text of an example, and whether it is learned, run by run.

        The token that begins every document is left out.
        """
        tokens = zip(example.tokens[1:].tolist(), (example.weight[1:] > 0).tolist(), strict=True)
        return [
            (self.tokenizer.decode([t for t, _ in run]), learned)
            for learned, run in groupby(tokens, key=lambda pair: pair[1])
        ]


@dataclass
class Problems:
    """The errors of a file's rows: how many, and the first of them. An OnError."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def __call__(self, error: UserError) -> None:
        self.count += 1
        if len(self.first) < MOST_LISTED:
            self.first.append(str(error))


class FileSummary:
    """Counts rows as they are added."""

    def __init__(self) -> None:
        self.num_good = self.num_left_out = 0
        self.notes: Counter[str] = Counter()
        self.labels: dict[str, Counter[str]] = {g: Counter() for g in reflection.GROUPS}
        self.shown: list[tuple[str, Example]] = []  # where, and the row
        self.num_learned = 0  # tokens
        self.longest = ""  # where it stands
        self._lengths: Counter[int] = Counter()
        self._max = 0
        self._hashes = array("Q")  # of ids

    def wants_example(self, counts_tokens: bool) -> bool:
        """Whether the next row's tokens are needed: to be counted, or to be shown."""
        return counts_tokens or len(self.shown) < NUM_SHOWN

    def add(self, row: FileRow, example: Example | None, counts_tokens: bool) -> None:
        """Counts a row. example: its tokens, if they are wanted."""
        self.notes.update(row.notes)
        if row.record is None:
            self.num_left_out += 1
            return
        self.num_good += 1
        if row.id:
            self._hashes.append(_hash(row.id))
        for group, token in row.labels:
            self.labels[group][token] += 1
        if example is None:
            return
        if len(self.shown) < NUM_SHOWN:
            self.shown.append((row.where, example))
        if counts_tokens:
            n = len(example.tokens)
            if n > self._max:
                self._max, self.longest = n, row.where
            self._lengths[n] += 1
            self.num_learned += int((example.weight > 0).sum())

    # ---- ids -------------------------------------------------------------------------------------
    def repeated_ids(self) -> tuple[int, int, set[int]]:
        """Returns how many ids there are, how many rows repeat one, and hashes of such ids."""
        hashes = np.sort(np.frombuffer(self._hashes, np.uint64)) if self._hashes else np.array([])
        repeats = hashes[1:][hashes[1:] == hashes[:-1]]
        some = np.unique(repeats)[:MOST_IDS_LISTED]
        return len(hashes) - len(repeats), len(repeats), set(some.tolist())

    # ---- lengths ---------------------------------------------------------------------------------
    def lengths(self, limit: int | None) -> dict[str, Any]:
        """Returns total, p50, p95, max and, with a limit, the number of rows above it, in tokens.

        {} if no row was counted.
        """
        if not self._lengths:
            return {}
        above = sum(count for n, count in self._lengths.items() if limit and n > limit)
        return {
            "total": sum(n * count for n, count in self._lengths.items()),
            "learned": self.num_learned,
            "p50": self._percentile(0.5),
            "p95": self._percentile(0.95),
            "max": self._max,
            "longest": self.longest,
            "limit": limit,
            "longer": above,
        }

    def _percentile(self, share: float) -> int:
        """The least length that at least this share of the rows does not exceed."""
        seen, rows = 0, sum(self._lengths.values())
        for n, count in sorted(self._lengths.items()):
            seen += count
            if seen >= share * rows:
                return n
        raise AssertionError("shares are at most 1")


def repeated_places(rows: Iterable[FileRow], hashes: set[int]) -> Iterator[tuple[str, str, str]]:
    """Yields (where, id, where it stood first) of the rows that repeat an id of these hashes."""
    first: dict[str, str] = {}
    for row in rows:
        if row.id and row.record is not None and _hash(row.id) in hashes:
            where = first.setdefault(row.id, row.where)
            if where != row.where:
                yield row.where, row.id, where


def _hash(id_: str) -> int:
    return int(id_hashes([id_])[0])
