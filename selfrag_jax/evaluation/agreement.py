"""Agreement of two teachers: their labels of the same queries, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import critic_scores, metrics
from selfrag_jax.evaluation.scores import Row
from selfrag_jax.records import CriticExample
from selfrag_jax.text import reflection


class NothingInCommon(UserError):
    """Two teachers have no query in common; the message says what their queries differ in."""


@dataclass(frozen=True)
class GroupAgreement:
    """How two teachers labelled one group's queries."""

    group: str
    table: Int[np.ndarray, "n n"]  # rows: the first teacher's labels; columns: the second's
    only_first: int  # queries that only one of them labelled
    only_second: int

    @property
    def n(self) -> int:
        return int(self.table.sum())


def compare_labels(
    first: Sequence[CriticExample], second: Sequence[CriticExample]
) -> list[GroupAgreement]:
    """Returns the agreement in each group that either has, in reflection.GROUPS' order.

    Queries are matched by what was asked (`query_of`), not by their order. A query that stands in a
    file several times is matched as often as both have it, the first with the first.

    Raises NothingInCommon if no query is in both.
    """
    labels, others = _labels_by_query(first), _labels_by_query(second)
    if not labels.keys() & others.keys():
        raise NothingInCommon(f"no query is in both{_why_none(first, second)}")
    found = []
    for group, tokens in reflection.GROUPS.items():
        pairs, only_first, only_second = Counter[tuple[str, str]](), 0, 0
        for query in [q for q in dict.fromkeys([*labels, *others]) if q[0] == group]:
            mine, theirs = labels.get(query, []), others.get(query, [])
            common = min(len(mine), len(theirs))
            pairs.update(zip(mine[:common], theirs[:common], strict=True))
            only_first += len(mine) - common
            only_second += len(theirs) - common
        table = np.array([[pairs[a, b] for b in tokens] for a in tokens])
        if pairs or only_first or only_second:
            found.append(GroupAgreement(group, table, only_first, only_second))
    return found


def query_of(example: CriticExample) -> tuple[str, ...]:
    """What the teacher was asked: everything but the answer, and the passage's id and score."""
    evidence = example.evidence
    passage = ("", "", "") if evidence is None else ("passage", evidence.title, evidence.text)
    return (
        example.task,
        example.id,
        example.instruction,
        example.preceding,
        example.segment,
        *passage,
    )


def agreement_rows(groups: Sequence[GroupAgreement], seed: int) -> list[Row]:
    """Returns rows of results.json: accuracy (share of equal labels) and kappa of each group.

    A group without a common query has no row. One in which kappa has no value
    (critic_scores.cohens_kappa) has no row for it.
    """
    rows = []
    for g in groups:
        if not g.n:
            continue
        equal = int(np.trace(g.table))
        share = metrics.interval([1.0] * equal + [0.0] * (g.n - equal), seed)
        kappa = critic_scores.kappa_interval(g.table, seed)
        for name, (value, low, high) in (("accuracy", share), ("kappa", kappa)):
            if not np.isnan(value):
                row = {"system": "agreement", "task": "agree", "metric": f"{g.group}_{name}"}
                rows.append(row | {"value": value, "low": low, "high": high, "n": g.n})
    return rows


def _labels_by_query(examples: Sequence[CriticExample]) -> dict[tuple[str, ...], list[str]]:
    labels: dict[tuple[str, ...], list[str]] = {}
    for example in examples:
        labels.setdefault(query_of(example), []).append(example.output)
    return labels


def _why_none(first: Sequence[CriticExample], second: Sequence[CriticExample]) -> str:
    """The end of the message when nothing matches: what the queries differ in."""

    def common(part: slice) -> set[tuple[str, ...]]:
        mine, theirs = ({query_of(e)[part] for e in examples} for examples in (first, second))
        return mine & theirs

    if not common(slice(0, 1)):
        names = (", ".join(sorted({e.task for e in examples})) for examples in (first, second))
        return ": they are of other groups ({} and {})".format(*names)
    if not common(slice(1, 3)):
        if common(slice(2, 3)):
            return ": instructions are the same, but not their ids (field 'id')"
        return ": they have no instruction in common; both must be made from the same input"
    return (
        ": instructions are the same, but not what stands beside them (preceding, evidence, "
        "segment); both must be made from the same passages, with the same seed"
    )
