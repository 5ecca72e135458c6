"""Critic data: a teacher critiques instructions and their retrieved passages.

See Section 3.2.1 of the paper. The rule teacher knows the truth and errs at a given rate. Any other
source of labels, such as a language model behind an API, can implement `Teacher`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from selfrag_jax.errors import UserError
from selfrag_jax.records import Instruction
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.sentences import split_sentences


class Teacher(Protocol):
    def judge(self, query: CritiqueQuery, row_id: str) -> str:
        """Returns a reflection token of the query's group. row_id: the instruction's id."""
        ...


class RuleTeacher:
    """A teacher that knows the truth and errs at a given rate.

    truth: returns the correct reflection token of a query.
    """

    def __init__(self, truth: Callable[[CritiqueQuery], str], error_rate: float, seed: int):
        self.truth, self.error_rate, self.seed = truth, error_rate, seed

    def judge(self, query: CritiqueQuery, row_id: str) -> str:
        """Returns the truth or, at the error rate, another token of the query's group.

        Errors depend only on the query and the row, not on earlier calls. The row is included so
        that a question in many rows is not wrong in all of them.
        """
        label = self.truth(query)
        rng = random.Random(f"{self.seed}-{row_id}-{query}")
        if rng.random() < self.error_rate:
            return rng.choice([t for t in reflection.GROUPS[query.group] if t != label])
        return label


@dataclass(frozen=True)
class CollectConfig:
    seed: int
    teacher: str  # "rule"
    teacher_error_rate: float
    share: tuple[tuple[str, float], ...]  # per critique group: the share of instructions queried
    passages: int  # retrieved passages to query per instruction

    def __post_init__(self):
        if self.teacher != "rule":
            raise UserError(f"--teacher={self.teacher!r}: unknown; available: rule")


def critique_queries(
    row: Instruction, config: CollectConfig, rng: random.Random
) -> Iterator[CritiqueQuery]:
    """Yields the queries to the teacher about one instruction."""
    share = dict(config.share)
    text = row.full_instruction
    sentences = split_sentences(row.output) or [""]
    if rng.random() < share["retrieve"]:
        yield CritiqueQuery("retrieve", text)
        if row.ctxs:
            for k in range(1, len(sentences)):
                evidence = rng.choice(row.ctxs[:2])
                yield CritiqueQuery("retrieve", text, " ".join(sentences[:k]), evidence)
    passages = list(row.ctxs[: config.passages])
    for passage in passages:
        if rng.random() < share["isrel"]:
            yield CritiqueQuery("isrel", text, evidence=passage)
    # The first two are mostly about the right entity, the others about similar ones.
    for passage in passages[:2] + ([rng.choice(passages[2:])] if len(passages) > 2 else []):
        if rng.random() < share["issup"]:
            yield CritiqueQuery("issup", text, evidence=passage, output=rng.choice(sentences))
    if rng.random() < share["isuse"]:
        yield CritiqueQuery("isuse", text, output=row.output)
