"""Citations: which segment of an answer rests on which passage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from selfrag_jax.answering.asked import missing_names
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
    notice: str = ""  # why the passage may not be about what was asked


def cite(path: Sequence[Judged], question: str = "") -> tuple[list[Passage], list[Citation]]:
    """The passages that a path's segments rest on, in order of first use, and the citations.

    A segment cites its passage unless the model judges the passage irrelevant, or the segment
    unsupported by it. question: a citation whose passage does not mention what it asks about gets
    a notice (asked.py). No citation is left out for it.
    """
    passages: list[Passage] = []
    index: dict[tuple[str, str, str], int] = {}  # by content: scores differ between queries
    citations = []
    for i, node in enumerate(path):
        if node.passage is None:
            continue
        support = reflection.ISSUP[max(range(3), key=lambda j: node.issup[j])]
        was_judged = sum(node.issup) > 0  # all zeros if the search never read IsSup
        if not was_judged or is_irrelevant(node) or support == reflection.NO_SUPPORT:
            continue
        key = (node.passage.id, node.passage.title, node.passage.text)
        if key not in index:
            index[key] = len(passages)
            passages.append(node.passage)
        notice = _notice(question, node.passage)
        citations.append(Citation(i, index[key], support, notice))
    return passages, citations


def is_irrelevant(node: Judged) -> bool:
    """Whether the model judges the segment's passage irrelevant."""
    return node.passage is not None and node.isrel[0] > node.isrel[1]


def _notice(question: str, passage: Passage) -> str:
    missing = missing_names(question, passage)
    title = f'"{passage.title}"' if passage.title else "the passage"
    return f"{title} does not mention {missing}" if missing else ""


def doubts(path: Sequence[Judged], citations: Sequence[Citation]) -> list[str]:
    """Why an answer may be a guess, by the passages of its segments and what it cites of them."""
    found = []
    with_passage = [n for n in path if n.passage is not None]
    irrelevant = [i for i, n in enumerate(path, 1) if is_irrelevant(n)]
    if with_passage and not citations:
        if len(irrelevant) == len(with_passage):
            found.append("no passage about this was found: take the answer as a guess")
        else:
            found.append("no passage that was found supports this answer: take it as a guess")
    elif irrelevant:
        listed = ", ".join(map(str, irrelevant))
        several = len(irrelevant) > 1
        which, whose = ("segments", "their passages") if several else ("segment", "its passage")
        found.append(f"{which} {listed}: the model judges {whose} irrelevant; not cited")
    return found + citation_notices(citations)


def citation_notices(citations: Iterable[Citation]) -> list[str]:
    """The notices of citations as an answer shows them, with the numbers of their passages."""
    numbers: dict[str, dict[int, None]] = {}
    for c in citations:
        if c.notice:
            numbers.setdefault(c.notice, {})[c.passage + 1] = None
    return [" ".join(f"[{n}]" for n in found) + f" {text}" for text, found in numbers.items()]
