"""What a teacher is: requests in, verdicts out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery

# The kinds of query, each with a template of its own. Before anything is retrieved there is no
# evidence to continue with, so the first kind has two answers where the second has three.
LABELS: dict[str, tuple[str, ...]] = {
    "retrieve": (reflection.NO_RETRIEVAL, reflection.RETRIEVAL),
    "retrieve_next": reflection.RETRIEVE,
    "isrel": reflection.ISREL,
    "issup": reflection.ISSUP,
    "isuse": reflection.ISUSE,
}


def kind_of(query: CritiqueQuery) -> str:
    """Returns the query's key in LABELS."""
    if query.group == "retrieve" and (query.preceding or query.evidence is not None):
        return "retrieve_next"
    return query.group


@dataclass(frozen=True)
class Request:
    """One query to a teacher. row_id: the instruction's id."""

    query: CritiqueQuery
    row_id: str


@dataclass(frozen=True)
class Usage:
    """Tokens that were paid for."""

    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out)

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.tokens_in - other.tokens_in, self.tokens_out - other.tokens_out)


@dataclass(frozen=True)
class Verdict:
    """A teacher's answer: a token of the query's group, or the reason why there is none.

    Without either, asking was stopped: the request stays open, and `usage` was paid all the same.
    """

    token: str | None
    reason: str = ""
    explanation: str = ""
    raw: str = ""  # the last reply, word for word
    usage: Usage = Usage()  # of all attempts
    seconds: float = 0.0


class Teacher(Protocol):
    def identity(self) -> dict[str, Any]:
        """Returns all settings that shape a reply; with the prompt, they are the cache's key."""
        ...

    def prompt(self, query: CritiqueQuery) -> str:
        """Returns all that the teacher is told about a query."""
        ...

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Verdict]]:
        """Yields (index of the request, verdict) of every request, in any order.

        Raises StageFailed or UserError if it is of no use to go on; what was yielded stays valid.
        """
        ...


def cache_key(teacher: Teacher, query: CritiqueQuery) -> str:
    """Returns a hash of everything that shapes the teacher's reply to a query."""
    shaped_by = [teacher.identity(), kind_of(query), teacher.prompt(query)]
    return hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()
