"""Answers with the passages of their search, as exports need them; read beside the questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.answer_rows import (
    Row,
    cited_passages,
    pair,
    passage_key,
    read_answer_rows,
    retrieved_passages,
)
from selfrag_jax.records import Passage, Question, text_field


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
    located = read_answer_rows(path)
    if questions is None:
        return [
            _cited_answer(where, row, Question(str(row["id"]), text_field(where, row, "question")))
            for where, row in located
        ]
    places = {str(row["id"]): where for where, row in located}
    try:
        pairs = pair(questions, [row for _, row in located], instruction_around=True)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    return [_cited_answer(places[q.id], row, q) for q, row in pairs]


def _cited_answer(where: str, row: Row, question: Question) -> CitedAnswer:
    own, retrieved = cited_passages(row, where), retrieved_passages(row, where)
    passages = {passage_key(p): p for p in (*own, *retrieved)}
    place = {key: i for i, key in enumerate(passages)}
    cited: list[list[int]] = [[] for _ in row["segments"]]
    for c in row["citations"]:
        cited[c["segment"]].append(place[passage_key(own[c["passage"]])])
    return CitedAnswer(
        where=where,
        question=question,
        text="" if row.get("error") else row["answer"].strip(),
        segments=tuple(str(s["text"]) for s in row["segments"]),
        cited=tuple(map(tuple, cited)),
        passages=tuple(passages.values()),
        retrieved=tuple(retrieved),
        lacks_passages=bool(row.get("retrieved")) and not retrieved,
    )
