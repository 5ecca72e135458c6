"""Files of `selfrag answer`: rows are checked as they are read, and set beside their questions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, Question, passage_from, read_rows, text_field

Row = dict[str, Any]
_NEEDED = ("id", "answer", "segments", "citations", "passages")


def read_answer_rows(path: str | Path, needed: Sequence[str] = ()) -> list[tuple[str, Row]]:
    """Returns ("file:line", row) for each row of a file of answers.

    needed: fields that a row must have besides those that any reader needs. Raises UserError with
    file, line and field if a row lacks one or holds what is no answer, if an id occurs twice, and
    if there are no rows.
    """
    found, seen = [], set()
    for where, row in read_rows(path):
        _check(where, row, (*_NEEDED, *needed))
        key = text_field(where, row, "id")
        if key in seen:
            raise UserError(f"{where}: id {key!r} occurs more than once")
        seen.add(key)
        found.append((where, row))
    if not found:
        raise UserError(f"{path}: holds no answers; write them with `selfrag answer`")
    return found


def read_predictions(path: str | Path) -> list[Row]:
    """Returns the rows of a file of answers to score. Raises UserError as `read_answer_rows`."""
    return [row for _, row in read_answer_rows(path, ("retrieved",))]


def _check(where: str, row: Row, needed: Sequence[str]) -> None:
    for name in needed:
        if name not in row:
            raise UserError(f"{where}: missing field {name!r}; expected a row of `selfrag answer`")
    if not isinstance(row["answer"], str):
        raise UserError(f"{where}: field 'answer' must be text")
    try:
        require_finite(where, row)
    except UserError as e:
        raise UserError(f"{e}; answer the questions again, with intact weights") from None
    for name in ("segments", "citations", "passages", "tree"):  # baselines have no tree
        value = row.get(name, [])
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise UserError(f"{where}: field {name!r} must be a list of objects")
    retrieved_passages(row, where)
    for i, segment in enumerate(row["segments"], 1):
        text_field(f"{where}: segment {i}", segment, "text")
    for i, c in enumerate(row["citations"], 1):
        for name in ("segment", "passage"):
            limit = len(row[f"{name}s"])
            if type(c.get(name)) is not int or not 0 <= c[name] < limit:
                raise UserError(
                    f"{where}: citation {i}: {name} {c.get(name)!r} must be one of its row's "
                    f"{limit} {name}s, counted from 0"
                )


def require_finite(where: str, row: Row) -> None:
    """Raises UserError naming a NaN or infinite number, which JSON has not."""
    rest: list[tuple[str, Any]] = [("", row)]
    while rest:
        at, value = rest.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: field {at!r} is {value}; expected a finite number")
        if isinstance(value, dict):
            rest += [(f"{at}.{key}" if at else key, v) for key, v in value.items()]
        elif isinstance(value, list):
            rest += [(f"{at}[{i}]", v) for i, v in enumerate(value)]


# ---- passages ------------------------------------------------------------------------------------
def cited_passages(row: Row, where: str = "") -> list[Passage]:
    """Returns the passages that the row's citations count. Raises UserError if one is none."""
    return _passages(f"{where}: passages", row["passages"])


def retrieved_passages(row: Row, where: str = "") -> list[Passage]:
    """Returns all passages that a row holds, each once: those of its search, in its order, first.

    Raises UserError if one is none.
    """
    of_tree = [n["passage"] for n in row.get("tree", ()) if n.get("passage")]
    of_segments = [s["passage"] for s in row["segments"] if s.get("passage")]
    found = [
        *_passages(f"{where}: tree", of_tree),
        *cited_passages(row, where),
        *_passages(f"{where}: segments", of_segments),
    ]
    return list({passage_key(p): p for p in found}.values())


def passage_key(p: Passage) -> tuple[str, str, str]:
    """What tells passages apart: an id alone may be that of a page with several."""
    return p.id, p.title, p.text


def _passages(where: str, rows: Sequence[Any]) -> list[Passage]:
    return [passage_from(where, p, i) for i, p in enumerate(rows)]


# ---- questions -----------------------------------------------------------------------------------
def pair(
    questions: Sequence[Question], rows: Sequence[Row], instruction_around: bool = False
) -> list[tuple[Question, Row]]:
    """Returns each question with its answer.

    instruction_around: one's text may hold the other's, as where a task's instruction is around a
    question. Raises UserError if an answer is missing or superfluous, if an id occurs twice, or if
    an answer is of another question under the same id: then it is of another file.
    """
    remedy = "give the question file that these answers were made from"
    for names, what in (
        ([str(row["id"]) for row in rows], "answers"),
        ([q.id for q in questions], "question file"),
    ):
        if twice := [i for i, times in Counter(names).items() if times > 1]:
            raise UserError(f"id {twice[0]!r} occurs more than once in the {what}")
    by_id = {str(row["id"]): row for row in rows}
    known = {q.id for q in questions}
    if foreign := [i for i in by_id if i not in known]:
        raise UserError(
            f"id {foreign[0]!r} is not in the question file ({len(foreign)} of {len(by_id)} "
            f"answers); {remedy}"
        )
    if missing := [q.id for q in questions if q.id not in by_id]:
        raise UserError(
            f"{len(missing)} of {len(questions)} questions have no answer, e.g. id "
            f"{missing[0]!r}; {remedy}"
        )
    pairs = [(q, by_id[q.id]) for q in questions]
    for q, row in pairs:
        # Numbers as ids match any file; the texts tell.
        asked, text = (" ".join(t.split()) for t in (str(row.get("question") or ""), q.question))
        if asked in ("", text) or (instruction_around and (asked in text or text in asked)):
            continue
        raise UserError(
            f"question {q.id!r} is {text[:80]!r} in the question file and {asked[:80]!r} in the "
            f"answers; {remedy}"
        )
    return pairs
