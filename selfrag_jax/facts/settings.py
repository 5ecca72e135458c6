"""Everything that can be set about a world of facts."""

from __future__ import annotations

from dataclasses import dataclass

from selfrag_jax.errors import UserError
from selfrag_jax.facts.table import KINDS

TASKS = (
    "facts", "unanswerable", "claims", "multiple_choice", "comparison", "description", "no_need",
)  # fmt: skip
LONG_FORM = ("comparison", "description")  # several segments; other tasks take one


@dataclass(frozen=True)
class FactsConfig:
    seed: int
    kinds: tuple[tuple[str, float], ...]  # kind -> its share of the entities that are asked about
    train: int  # entities that training asks about
    test: int  # entities that only the evaluation asks about
    distractors: int  # look-alikes of both, and others of their kinds, that nobody asks about
    lacking_rate: float  # share of train and test entities of which the corpus lacks one fact
    absent_rate: float  # share of train and test entities of which the corpus has no passage
    second_passage_rate: float  # share of entities with a second passage
    list_passages: int  # passages that say something about several entities each
    instructions: int  # rows of instructions.jsonl
    shares: tuple[tuple[str, float], ...]  # task -> its share of the instructions
    wrong_output_rate: float  # share of wrong outputs among rows that can have one
    known_from: int  # the decile of popularity from which facts need no retrieval; 10: none
    fact_questions: int  # of eval/facts.jsonl, the task of ablations and narrow intervals
    test_questions: int  # of each other evaluation file, as far as there are entities for them
    critic_questions: int  # rows of eval/critic.jsonl

    def __post_init__(self):
        counts = "train", "test", "instructions", "fact_questions", "test_questions"
        for name in (*counts, "critic_questions"):
            if getattr(self, name) < 1:
                raise self._error(name, "must be at least 1")
        for name in ("distractors", "list_passages"):
            if getattr(self, name) < 0:
                raise self._error(name, "must not be negative")
        for name in ("lacking_rate", "absent_rate", "second_passage_rate", "wrong_output_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise self._error(name, "must be between 0 and 1")
        if not 0 <= self.known_from <= 10:
            raise self._error("known_from", "must be a decile from 0 to 9, or 10: none is known")
        for name, known in (("kinds", KINDS), ("shares", TASKS)):
            found = dict(getattr(self, name))
            if unknown := sorted(set(found) - set(known)):
                raise self._error(name, f"no {unknown[0]!r}; there are {', '.join(known)}")
            if min(found.values(), default=0) < 0 or sum(found.values()) <= 0:
                raise self._error(name, "must be shares above 0")

    def _error(self, field: str, remedy: str) -> UserError:
        return UserError(f"config world: {field}={getattr(self, field)!r}: {remedy}")
