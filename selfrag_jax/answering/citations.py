"""Citations: which sentence of an answer rests on which passage. Every index points into the answer's own passage list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfrag_jax.records import Passage
from selfrag_jax.search.tree import Node
from selfrag_jax.text import reflection


@dataclass(frozen=True)
class Citation:
    segment: int  # index into the answer's segments
    passage: int  # index into the answer's passages
    support: str  # the most likely IsSup token


def cite(path: Sequence[Node]) -> tuple[list[Passage], list[Citation]]:
    """The distinct passages that a path's segments rest on, in order of first use, and one citation per such segment.

    A segment whose own passage is irrelevant or does not support it, by the model's own judgement, cites nothing.
    """
    passages: dict[
        tuple[str, str, str], Passage
    ] = {}  # another query gives the same passage another score
    citations = []
    for i, node in enumerate(path):
        if node.passage is None:
            continue
        support = reflection.ISSUP[max(range(3), key=lambda j: node.issup[j])]
        judged = sum(node.issup) > 0  # by the released scripts only where the model said so
        if not judged or support == reflection.NO_SUPPORT or node.isrel[0] > node.isrel[1]:
            continue
        key = (node.passage.id, node.passage.title, node.passage.text)
        passages.setdefault(key, node.passage)
        citations.append(Citation(i, [*passages].index(key), support))
    return [*passages.values()], citations
