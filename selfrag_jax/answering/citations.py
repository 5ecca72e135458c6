"""Citations: which segment of an answer rests on which passage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from selfrag_jax.records import Passage
from selfrag_jax.text import reflection


class Judged(Protocol):
    """A segment, as far as citations go: a node of the search tree, or a row of its file."""

    @property
    def passage(self) -> Passage | None: ...
    @property
    def isrel(self) -> tuple[float, ...]: ...
    @property
    def issup(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Citation:
    segment: int  # index into the answer's segments
    passage: int  # index into the answer's passages
    support: str  # the most likely IsSup token


def cite(path: Sequence[Judged]) -> tuple[list[Passage], list[Citation]]:
    """The passages that a path's segments rest on, in order of first use, and the citations.

    A segment cites its passage unless the model judges the passage irrelevant, or the segment
    unsupported by it.
    """
    passages: list[Passage] = []
    index: dict[tuple[str, str, str], int] = {}  # by content: scores differ between queries
    citations = []
    for i, node in enumerate(path):
        if node.passage is None:
            continue
        support = reflection.ISSUP[max(range(3), key=lambda j: node.issup[j])]
        is_relevant = node.isrel[1] >= node.isrel[0]
        was_judged = sum(node.issup) > 0  # all zeros if the search never read IsSup
        if not was_judged or not is_relevant or support == reflection.NO_SUPPORT:
            continue
        key = (node.passage.id, node.passage.title, node.passage.text)
        if key not in index:
            index[key] = len(passages)
            passages.append(node.passage)
        citations.append(Citation(i, index[key], support))
    return passages, citations
