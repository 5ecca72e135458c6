"""The questions of a report as one JSON object, bounded in number and size.

A question is a row of `selfrag answer` with system, task, gold and metrics added.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfrag_jax.evaluation.tables import Row, system_title

_NO_SUPPORT = 2  # its place in `issup`
# What ends a <script> element, opens a comment in it, or ends a line in old JavaScript.
_ESCAPES = {c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class PageLimits:
    """How much of a run goes into the page."""

    questions: int = 2000
    characters: int = 24_000_000  # of their JSON


def question_data(questions: Sequence[Row], limits: PageLimits) -> dict[str, Any]:
    """Returns the questions that the page shows, and the passages that they share.

    Where there are too many, wrong answers come first, then unsupported ones, then the others;
    what is shown keeps the order of the file.
    """
    passages: dict[tuple[str, str, str], int] = {}
    order = sorted(range(len(questions)), key=lambda i: _rank(questions[i]))
    shown, size = {}, 0
    for i in order[: max(limits.questions, 0)]:
        known = len(passages)
        item = _item(questions[i], passages)
        size += len(json.dumps(item)) + sum(
            len(text) + len(title) + 16 for _, title, text in list(passages)[known:]
        )
        if size > limits.characters:
            break
        shown[i] = item
    items = [shown[i] for i in sorted(shown)]
    wrong = [accuracy is not None and accuracy < 1 for accuracy in map(_accuracy, questions)]
    return {
        "total": len(questions),
        "shown": len(items),
        "wrong": sum(wrong),
        "wrong_shown": sum(wrong[i] for i in shown),
        "systems": {s: system_title(s) for s in dict.fromkeys(q["system"] for q in items)},
        "tasks": list(dict.fromkeys(q["task"] for q in items)),
        "questions": items,
        "passages": [{"id": i, "title": title, "text": text} for i, title, text in passages],
    }


def script_json(data: Any) -> str:
    """Returns JSON that is harmless inside a <script> element, whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate cannot be written as UTF-8.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(_ESCAPES.get(c, c) for c in text)


def _accuracy(q: Row) -> float | None:
    return q.get("metrics", {}).get("accuracy")


def _rank(q: Row) -> tuple[bool, bool]:
    accuracy = _accuracy(q)
    return accuracy is None or accuracy == 1, not unsupported(q)


def unsupported(q: Row) -> bool:
    """Whether a chosen segment's passage does not support it, by the model's own critique."""
    return any(
        n["chosen"] and n["passage"] and max(n["issup"]) == n["issup"][_NO_SUPPORT]
        for n in q.get("tree", ())
    )


def _item(q: Row, passages: dict[tuple[str, str, str], int]) -> dict[str, Any]:
    """Returns what the page needs of a question; fields without a value are left out."""

    def place(p: Row) -> int:
        key = (str(p.get("id", "")), str(p.get("title") or ""), str(p.get("text") or ""))
        return passages.setdefault(key, len(passages))

    cited = [place(p) for p in q.get("passages", ())]
    item = {
        "id": str(q.get("id", "")),
        "system": q.get("system", ""),
        "task": q.get("task", ""),
        "question": q.get("question", ""),
        "answer": q.get("answer", ""),
        "gold": list(map(str, q.get("gold", ()))),
        "metrics": {name: round(float(v), 4) for name, v in q.get("metrics", {}).items()},
        "popularity": q.get("popularity"),
        "retrieved": bool(q.get("retrieved")),
        "unsupported": unsupported(q),
        "p": _rounded(q.get("p_retrieve")),
        "score": _rounded(q.get("score")),
        "segments": [s["text"] for s in q.get("segments", ())],
        "citations": [
            [c["segment"], cited[c["passage"]], c.get("support", "")]
            for c in q.get("citations", ())
        ],
        "tree": [_node(n, place) for n in q.get("tree", ())],
        "notices": list(q.get("notices", ())),
        "error": q.get("error", ""),
    }
    keep = {"question", "answer", "retrieved", "system", "task", "id"}
    return {k: v for k, v in item.items() if k in keep or v not in (None, "", [], {}, False)}


def _node(n: Row, place) -> dict[str, Any]:
    node = {
        "id": n.get("id", 0),
        "parent": n.get("parent", -1),
        "action": n.get("action", ""),
        "text": n["text"],
        "p": _rounded(n["p_segment"]),
        "score": _rounded(n["score"]),
        "isuse": [_rounded(v, 3) for v in n["isuse"]],
    }
    if n["passage"]:
        node |= {
            "passage": place(n["passage"]),
            "isrel": [_rounded(v, 3) for v in n["isrel"]],
            "issup": [_rounded(v, 3) for v in n["issup"]],
        }
    if "p_retrieve" in n:
        node["retrieve"] = _rounded(n["p_retrieve"])
    if n["chosen"]:
        node["chosen"] = True
    if not n.get("allowed", True):
        node["dropped"] = True  # by a hard constraint
    return node


def _rounded(value: float | None, digits: int = 4) -> float | None:
    """Returns None for what is no number; JSON has no NaN."""
    return None if value is None or not math.isfinite(value) else round(value, digits)
