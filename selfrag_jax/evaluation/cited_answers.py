"""Answers with the passages of their search, as exports need them; read beside the questions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, Question, passage_from, read_rows, text_field

Item = dict[str, Any]
_FIELDS_OF_ANSWER = ("id", "answer", "segments", "citations", "passages")


@dataclass(frozen=True)
class CitedAnswer:
    """What an export needs of a row of `selfrag answer`."""

    where: str  # file and line, for errors
    question: Question
    text: str  # "" if there is no answer
    segments: tuple[str, ...]
    cited: tuple[tuple[int, ...], ...]  # for each segment, indices into `passages`
    passages: tuple[Passage, ...]  # those cited first, then all others of the search, each once
    retrieved: tuple[Passage, ...]  # all of the search, in its order
    lacks_passages: bool = False  # it was made from passages that its row does not hold


def read_answers(path: str | Path, questions: Sequence[Question] | None) -> list[CitedAnswer]:
    """Reads a file of answers, in the order of the questions; None stands for no question file.

    Raises UserError if a field is missing or wrong, if an id occurs twice, and if answers and
    questions are not of the same ids and texts.
    """
    rows: dict[str, tuple[str, Item]] = {}
    for where, row in read_rows(path):
        for name in _FIELDS_OF_ANSWER:
            if name not in row:
                raise UserError(
                    f"{where}: missing field {name!r}; expected a row of `selfrag answer`"
                )
        key = text_field(where, row, "id")
        if key in rows:
            raise UserError(f"{where}: id {key!r} occurs more than once")
        require_finite(where, row)
        rows[key] = where, row
    if not rows:
        raise UserError(f"{path}: holds no answers")
    if questions is None:
        asked = [Question(key, text_field(w, row, "question")) for key, (w, row) in rows.items()]
        return [_cited_answer(*rows[q.id], q) for q in asked]
    _require_same_ids(path, rows, questions)
    return [_cited_answer(*rows[q.id], q) for q in questions]


def _require_same_ids(
    path: str | Path, rows: dict[str, tuple[str, Item]], questions: Sequence[Question]
) -> None:
    ids = [q.id for q in questions]
    known = set(ids)
    remedy = "give the --task that these answers were made from"
    if len(known) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise UserError(f"--task: id {twice!r} occurs more than once in the question file")
    if foreign := [where for key, (where, _) in rows.items() if key not in known]:
        raise UserError(
            f"{foreign[0]}: its id is not in the question file ({len(foreign)} of {len(rows)} "
            f"answers); {remedy}"
        )
    if missing := [key for key in ids if key not in rows]:
        raise UserError(
            f"{path}: {len(missing)} of {len(ids)} questions have no answer, e.g. id "
            f"{missing[0]!r}; {remedy}"
        )
    for q in questions:
        where, row = rows[q.id]
        # Numbers as ids match any file; the texts tell. A task's instruction may be around one.
        asked, known_as = (" ".join(t.split()) for t in (str(row.get("question", "")), q.question))
        if asked not in known_as and known_as not in asked:
            raise UserError(
                f"{where}: answers {asked[:60]!r}, but question {q.id!r} is {known_as[:60]!r}; "
                f"{remedy}"
            )


def _cited_answer(where: str, row: Item, question: Question) -> CitedAnswer:
    segments = _objects(where, row, "segments")
    own = _passages(where, row["passages"], "passages")
    of_segments = [s["passage"] for s in segments if s.get("passage")]
    of_tree = [n["passage"] for n in _objects(where, row, "tree") if n.get("passage")]
    retrieved = [*_passages(where, of_tree, "tree"), *own]
    retrieved += _passages(where, of_segments, "segments")
    passages = {_key(p): p for p in (*own, *retrieved)}
    place = {key: i for i, key in enumerate(passages)}
    cited: list[list[int]] = [[] for _ in segments]
    for i, c in enumerate(_objects(where, row, "citations"), 1):
        for name, limit in (("segment", len(segments)), ("passage", len(own))):
            if type(c.get(name)) is not int or not 0 <= c[name] < limit:
                raise UserError(
                    f"{where}: citation {i}: {name} {c.get(name)!r} must be one of its row's "
                    f"{limit} {name}s, counted from 0"
                )
        cited[c["segment"]].append(place[_key(own[c["passage"]])])
    failed = bool(row.get("error"))
    return CitedAnswer(
        where=where,
        question=question,
        text="" if failed else text_field(where, row, "answer").strip(),
        segments=tuple(
            text_field(f"{where}: segment {i}", s, "text") for i, s in enumerate(segments, 1)
        ),
        cited=tuple(map(tuple, cited)),
        passages=tuple(passages.values()),
        retrieved=tuple({_key(p): p for p in retrieved}.values()),
        lacks_passages=bool(row.get("retrieved")) and not retrieved,
    )


def _key(p: Passage) -> tuple[str, str, str]:
    return p.id, p.title, p.text


def _passages(where: str, rows: Any, name: str) -> list[Passage]:
    if not isinstance(rows, list):
        raise UserError(f"{where}: field {name!r} must be a list of passages")
    return [passage_from(f"{where}: {name}", p, i) for i, p in enumerate(rows)]


def _objects(where: str, row: Item, name: str) -> list[Item]:
    """A list of objects; the answers of baselines have no `tree`."""
    value = row.get(name, [])
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise UserError(f"{where}: field {name!r} must be a list of objects")
    return value


def require_finite(where: str, row: Item) -> None:
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
