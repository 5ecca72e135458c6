"""The records of answers, and how a search tree becomes one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from selfrag_jax.answering.citations import Citation
from selfrag_jax.records import Passage, Question
from selfrag_jax.search.paper import BeamSearch
from selfrag_jax.search.tree import Node
from selfrag_jax.text.reflection import ISREL, ISSUP, ISUSE


@dataclass(frozen=True)
class Segment:
    text: str
    passage: Passage | None
    action: str
    p_retrieve: float
    isrel: dict[str, float]
    issup: dict[str, float]
    isuse: dict[str, float]
    score: float
    node: int  # its place in the answer's `tree`: the id there


@dataclass(frozen=True)
class Answer:
    """One answered question. `passages` are those cited; `tree` holds every segment that was generated."""

    id: str
    question: str
    answer: str
    segments: tuple[Segment, ...]
    citations: tuple[Citation, ...]
    passages: tuple[Passage, ...]
    retrieved: bool
    p_retrieve: float
    score: float
    tree: tuple[dict[str, Any], ...]
    notices: tuple[str, ...] = ()
    task: str = ""
    error: str = ""  # why there is no answer; the other questions have theirs

    def to_row(self) -> dict[str, Any]:
        """The record of `selfrag answer`."""
        row = asdict(self)
        row["scores"] = [s["score"] for s in row["segments"]]
        row["passages"] = [{k: v for k, v in p.items() if v is not None} for p in row["passages"]]
        return json.loads(json.dumps(row))


@dataclass(frozen=True)
class SegmentDone:
    """A segment of a question's answer that nothing can change any more."""

    id: str  # the question's
    segment: Segment


def _failed(q: Question, why: Exception) -> Answer:
    nothing: dict[str, Any] = dict(
        answer="", segments=(), citations=(), passages=(), retrieved=False, tree=()
    )
    return Answer(
        id=q.id,
        question=q.question,
        **nothing,
        p_retrieve=0.0,
        score=0.0,
        task=q.task,
        error=f"{type(why).__name__}: {why}",
    )


def _doubts(path: list[Node], citations: list[Citation]) -> list[str]:
    doubts = []
    if any(n.passage is not None for n in path) and not citations:
        if all(n.isrel[0] > n.isrel[1] for n in path if n.passage is not None):
            doubts.append("no passage about this was found: take the answer as a guess")
        else:
            doubts.append("no passage that was found supports this answer: take it as a guess")
    if not all(n.complete for n in path):
        doubts.append("a segment was cut at the length limit")
    return doubts


def _segment(search: BeamSearch, n: Node) -> Segment:
    named = lambda names, p: {k: round(v, 4) for k, v in zip(names, p, strict=True)}  # noqa: E731
    return Segment(
        text=search.text(n.tokens),
        passage=n.passage,
        action=n.action,
        p_retrieve=round(n.p_retrieve, 4),
        isrel=named(ISREL, n.isrel) if n.passage is not None else {},
        issup=named(ISSUP, n.issup) if n.passage is not None else {},
        isuse=named(ISUSE, n.isuse),
        score=round(n.score, 4),
        node=n.id,
    )


def _tree_node(search: BeamSearch, n: Node, path: list[Node]) -> dict[str, Any]:
    rounded = lambda p: [round(v, 4) for v in p]  # noqa: E731
    return {
        "id": n.id,
        "parent": n.parent,
        "action": n.action,
        "passage": None
        if n.passage is None
        else {"id": n.passage.id, "title": n.passage.title, "text": n.passage.text},
        "text": search.text(n.tokens),
        "said": search.critiques(n.tokens),
        "allowed": n.allowed,
        "p_segment": round(n.p_segment, 4),
        "isrel": rounded(n.isrel),
        "issup": rounded(n.issup),
        "isuse": rounded(n.isuse),
        "score": round(n.score, 4),
        "chosen": n in path,
    }
