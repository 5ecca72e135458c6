"""Answers under other weights or another threshold, from what was generated once.

In an answer of one segment, weights decide only which branch is chosen, and the threshold only
whether there is a passage: neither changes a token. So the rows of `selfrag answer` hold all that
a sweep over them needs. They are rounded to four digits: where two branches are closer than that,
a search may choose the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from selfrag_jax.answering.citations import Citation, cite, doubts
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage
from selfrag_jax.search import scoring
from selfrag_jax.search.paper import bare_option
from selfrag_jax.search.scoring import Weights
from selfrag_jax.text.reflection import ISREL, ISSUP, ISUSE, RETRIEVAL, RETRIEVE

Row = dict[str, Any]
ROUNDING = 1e-4  # of the probabilities in a row


@dataclass(frozen=True)
class _Branch:
    """What the citation of a tree's row is made from."""

    passage: Passage | None
    isrel: tuple[float, ...]
    issup: tuple[float, ...]


def rescored(row: Row, weights: Weights, options: Sequence[str] = ()) -> Row:
    """Returns a row of `selfrag answer` as the paper's scorer answers with other weights.

    options: of the question, if its passages vote. Raises UserError for an answer of several
    segments, whose search would have gone another way, and for a row without a tree.
    """
    tree = row["tree"]
    if not tree:
        raise UserError(f"answer {row['id']!r}: holds no tree; it was not made by `selfrag answer`")
    if any(n["parent"] >= 0 for n in tree):
        raise UserError(
            f"answer {row['id']!r}: has several segments; only answers of --max_depth=1 can be "
            "scored again"
        )
    scores = [_score(n, weights) for n in tree]
    tree = [n | {"score": s, "total": s} for n, s in zip(tree, scores, strict=True)]
    best, before = _chosen(tree, options), [n for n in tree if n.get("chosen")]
    tree = [n | {"chosen": n["id"] == best["id"]} for n in tree]
    answer = _as_answer(best, row["question"])
    old = {text for n in before for text in _notices(n, row["question"])}
    notices = [n for n in row["notices"] if n not in old] + _notices(best, row["question"])
    return row | answer | {"score": best["score"], "tree": tree, "notices": notices}


def _score(node: Row, weights: Weights) -> float:
    """f of a segment (search/scoring.py)."""
    isrel, issup, isuse = (np.array(node[name]) for name in ("isrel", "issup", "isuse"))
    has_passage = float(node["passage"] is not None)
    p = node["p_segment"]
    score = scoring.segment_score(p, isrel, issup, isuse, has_passage, weights)
    return round(scoring.finite(score), 4)


def _chosen(tree: Sequence[Row], options: Sequence[str]) -> Row:
    """The best branch; with options, the best of those whose option wins the vote."""
    allowed = [n for n in tree if n["allowed"]] or list(tree)
    votes: dict[str, list[Row]] = {bare_option(option): [] for option in options}
    for n in allowed:
        if bare_option(n["text"]) in votes:
            votes[bare_option(n["text"])].append(n)
    groups = [nodes for nodes in votes.values() if nodes] or [allowed]
    winner = max(groups, key=lambda nodes: sum(n["score"] for n in nodes))
    return max(winner, key=lambda n: n["score"])


def _branch(node: Row) -> _Branch:
    p = node["passage"]
    passage = None if p is None else Passage(p["id"], p["title"], p["text"])
    return _Branch(passage, tuple(node["isrel"]), tuple(node["issup"]))


def _cited(node: Row, question: str) -> tuple[list[Passage], list[Citation]]:
    """What an answer that is this one segment cites; without text, nothing."""
    branch = _branch(node)
    return cite([branch if node["text"] else replace(branch, passage=None)], question)


def _notices(node: Row, question: str) -> list[str]:
    """The notices of an answer that is this one segment, as make_answer has them."""
    _, citations = _cited(node, question)
    return [*node.get("notices", ()), *doubts([_branch(node)], citations)]


def _as_answer(node: Row, question: str) -> Row:
    """The fields of an answer that is this one segment."""
    p = node["passage"]
    passages, citations = _cited(node, question)
    # Answers that were written before tokens were counted have no number.
    counted = {"num_answer_tokens": node["num_tokens"]} if "num_tokens" in node else {}
    segment = {
        "text": node["text"],
        "passage": p,
        "action": node["action"],
        "p_retrieve": node["p_retrieve"],
        "isrel": dict(zip(ISREL, node["isrel"], strict=True)) if p else {},
        "issup": dict(zip(ISSUP, node["issup"], strict=True)) if p else {},
        "isuse": dict(zip(ISUSE, node["isuse"], strict=True)),
        "score": node["score"],
        "node": node["id"],
    }
    return {
        "answer": node["text"],
        "segments": [segment],
        "scores": [node["score"]],
        "citations": [vars(c) for c in citations],
        "passages": [{"id": q.id, "title": q.title, "text": q.text} for q in passages],
        "retrieved": node["action"] == "retrieve",
        **counted,
    }


def at_threshold(always: Row, never: Row, threshold: float | None) -> Row:
    """Returns the answer of adaptive retrieval, from those that always and never retrieve.

    threshold: of p(retrieve); None takes the most likely Retrieve token. As PaperSearch decides
    before a first segment.
    """
    if always["id"] != never["id"]:
        raise UserError(f"answers {always['id']!r} and {never['id']!r}: are not of one question")
    if threshold is None:
        p = always["tree"][0]["retrieve"]
        return always if RETRIEVE[p.index(max(p))] == RETRIEVAL else never
    return always if always["p_retrieve"] > threshold else never
