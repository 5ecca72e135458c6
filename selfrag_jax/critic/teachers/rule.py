"""The rule teacher: it knows the truth, and errs at a given rate."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from selfrag_jax.critic.teachers.teacher import Request, Verdict
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery


class RuleTeacher:
    """A teacher that knows the truth and errs at a given rate.

    truth: returns the correct reflection token of a query.
    """

    def __init__(self, truth: Callable[[CritiqueQuery], str], error_rate: float, seed: int):
        self.truth, self.error_rate, self.seed = truth, error_rate, seed

    def identity(self) -> dict[str, Any]:
        return {"teacher": "rule", "error_rate": self.error_rate, "seed": self.seed}

    def prompt(self, query: CritiqueQuery) -> str:
        return str(query)

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Verdict]]:
        for i, request in enumerate(requests):
            yield i, Verdict(self.judge(request.query, request.row_id))

    def judge(self, query: CritiqueQuery, row_id: str) -> str:
        """Returns the truth or, at the error rate, another token of the query's group.

        Errors depend only on the query and the row, not on earlier calls. The row is included so
        that a question in many rows is not wrong in all of them.
        """
        label = self.truth(query)
        if query.evidence is not None:  # retrieval scores differ in their last digits by machine
            query = replace(query, evidence=replace(query.evidence, score=None))
        rng = random.Random(f"{self.seed}-{row_id}-{query}")
        if rng.random() < self.error_rate:
            return rng.choice([t for t in reflection.GROUPS[query.group] if t != label])
        return label
