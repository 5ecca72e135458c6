"""The records of answers, and how a search tree becomes one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from selfrag_jax.answering.citations import Citation, cite, doubts
from selfrag_jax.answering.printable import printable, shortened
from selfrag_jax.records import Passage, Question
from selfrag_jax.search.search import SegmentSearch
from selfrag_jax.search.tree import Beam, Node, SearchTree
from selfrag_jax.text.reflection import ISREL, ISSUP, ISUSE


@dataclass(frozen=True)
class AnswerSegment:
    """A segment of an answer, with the probabilities of its critique tokens by name."""

    text: str
    passage: Passage | None
    action: str
    p_retrieve: float
    isrel: dict[str, float]
    issup: dict[str, float]
    isuse: dict[str, float]
    score: float
    node: int  # its id in the answer's `tree`


@dataclass(frozen=True)
class Answer:
    """An answered question.

    `passages` are those that `citations` point to; `tree` holds every segment that was generated.
    num_tokens: all tokens generated for the question, over all branches: what the search cost.
        Reflection tokens, the end of text, and what the released long form generates to decide on
        retrieval count; prompts, passages and the tokens fed before a segment do not.
    num_answer_tokens: those of the segments on the answer's path, counted in the same way.
    """

    id: str
    question: str
    answer: str
    segments: tuple[AnswerSegment, ...]
    citations: tuple[Citation, ...]
    passages: tuple[Passage, ...]
    retrieved: bool
    p_retrieve: float
    score: float
    tree: tuple[dict[str, Any], ...]
    notices: tuple[str, ...] = ()
    task: str = ""
    error: str = ""  # why there is no answer
    num_tokens: int = 0
    num_answer_tokens: int = 0

    def to_row(self) -> dict[str, Any]:
        """The record that `selfrag answer` writes.

        Probabilities and scores have four digits: the others depend on what was computed beside.
        """
        row = asdict(self) | {"score": round(self.score, 4)}
        row["scores"] = [s["score"] for s in row["segments"]]
        row["passages"] = [{k: v for k, v in p.items() if v is not None} for p in row["passages"]]
        return json.loads(json.dumps(row))  # tuples become lists, as in a file

    def __str__(self) -> str:
        """The answer with its marks, the passages they point to, and notices."""
        if self.error:
            return printable(f"no answer: {self.error}")
        lines = [cited_text(self)]
        for i, p in enumerate(self.passages, 1):
            lines.append(f"  [{i}] " + shortened(f"{p.title}: {p.text}".lstrip(": "), 400)[0])
        return printable("\n".join([*lines, *(f"note: {n}" for n in self.notices)]))

    def __repr__(self) -> str:
        question, answer = shortened(self.question, 60)[0], shortened(self.answer, 80)[0]
        said = f"error={self.error!r}" if self.error else f"answer={answer!r}"
        return (
            f"Answer(id={self.id!r}, question={question!r}, {said}, "
            f"citations={len(self.citations)}, score={self.score:.3f})"
        )


def cited_text(answer: Answer) -> str:
    """The answer's segments, each with the number of the passage that it cites."""
    marks = {c.segment: c.passage + 1 for c in answer.citations}
    return " ".join(
        f"{s.text} [{marks[i]}]" if i in marks else s.text for i, s in enumerate(answer.segments)
    )


@dataclass(frozen=True)
class SegmentDone:
    """A segment of a question's answer that nothing can change any more."""

    id: str  # the question's
    segment: AnswerSegment


def make_answer(
    search: SegmentSearch,
    tree: SearchTree,
    best: Beam,
    question: Question,
    by_vote: bool,
    notices: Sequence[str],
) -> Answer:
    """The answer that the search's best beam gives. by_vote: see SegmentSearch.render."""
    best, path, text = search.render(tree, best, question.task, by_vote)
    whole_path = tree.path(best)
    # A segment without text cites nothing.
    passages, citations = cite(
        [n if search.text(n.tokens) else replace(n, passage=None) for n in path],
        question.question,
    )
    of_search = [n.text for n in tree.notices if n.parent is None]
    of_path = [text for n in path for text in _node_notices(tree, n)]
    return Answer(
        id=question.id,
        question=question.question,
        answer=text,
        segments=tuple(answer_segment(search, n) for n in path),
        citations=tuple(citations),
        passages=tuple(passages),
        retrieved=any(n.action == "retrieve" for n in whole_path),
        p_retrieve=whole_path[0].p_retrieve,
        score=best.score(search.config.accumulate),
        tree=tuple(_tree_row(search, tree, n, chosen=n in path) for n in tree.nodes),
        notices=tuple(dict.fromkeys([*notices, *of_search, *of_path, *doubts(path, citations)])),
        task=question.task,
        num_tokens=tree.num_tokens,
        num_answer_tokens=sum(n.num_tokens for n in whole_path),
    )


def failed_answer(question: Question, error: Exception) -> Answer:
    return Answer(
        id=question.id,
        question=question.question,
        answer="",
        segments=(),
        citations=(),
        passages=(),
        retrieved=False,
        p_retrieve=0.0,
        score=0.0,
        tree=(),
        task=question.task,
        error=f"{type(error).__name__}: {error}",
    )


def answer_segment(search: SegmentSearch, node: Node) -> AnswerSegment:
    has_passage = node.passage is not None
    return AnswerSegment(
        text=search.text(node.tokens),
        passage=node.passage,
        action=node.action,
        p_retrieve=round(node.p_retrieve, 4),
        isrel=_by_name(ISREL, node.isrel) if has_passage else {},
        issup=_by_name(ISSUP, node.issup) if has_passage else {},
        isuse=_by_name(ISUSE, node.isuse),
        score=round(node.score, 4),
        node=node.id,
    )


def _node_notices(tree: SearchTree, node: Node) -> list[str]:
    cut = [] if node.complete else ["a segment was cut at the length limit"]
    return tree.notices_of(node) + cut


def _tree_row(search: SegmentSearch, tree: SearchTree, node: Node, chosen: bool) -> dict[str, Any]:
    p, notices = node.passage, _node_notices(tree, node)
    passage = None if p is None else {"id": p.id, "title": p.title, "text": p.text}
    return {
        "id": node.id,
        "parent": node.parent,
        "action": node.action,
        "p_retrieve": round(node.p_retrieve, 4),
        "retrieve": _rounded(node.retrieve),
        "passage": passage,
        "text": search.text(node.tokens),
        "num_tokens": node.num_tokens,
        "said": search.critiques(node.tokens),
        "allowed": node.allowed,
        "p_segment": round(node.p_segment, 4),
        "isrel": _rounded(node.isrel),
        "issup": _rounded(node.issup),
        "isuse": _rounded(node.isuse),
        "score": round(node.score, 4),
        "total": round(node.total, 4),
        "chosen": chosen,
    } | ({"notices": notices} if notices else {})


def _by_name(names: Sequence[str], p: Sequence[float]) -> dict[str, float]:
    return dict(zip(names, _rounded(p), strict=True))


def _rounded(p: Sequence[float]) -> list[float]:
    return [round(v, 4) for v in p]
