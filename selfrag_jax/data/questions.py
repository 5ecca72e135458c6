"""Reads evaluation files in their published formats into one record, Question.

short form       question | instruction; answers | answer | output; ctxs | top_contexts | docs
multiple choice  question, choices {label, text}, answerKey (ARC: labels may be 1-4, and there may
                 be three or five options)
closed set       short form with options, the only possible answers (claims: ["true", "false"])
several parts    question, qa_pairs [{short_answers}] (ALCE)
biographies      input, topic, cat (FactScore); the synthetic world adds its facts
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.records import Question, passages_from, read_records, text_field

_EXTRA_FIELDS: tuple[str, ...] = ("qa_pairs", "facts", "topic", "cat", "annotations")


def read_questions(path: str | Path, task: str = "") -> list[Question]:
    """Returns all questions of a file.

    task: name of the task; "" takes the file's. Raises UserError with file, line and field if a
    row is malformed, and if the file has no questions.
    """
    task = task or Path(path).stem
    numbers = count()
    return read_records(path, lambda where, row: _question(where, row, task, next(numbers)))


def _question(where: str, row: dict[str, Any], task: str, number: int) -> Question:
    text = text_field(where, row, ("question", "instruction", "input"))
    if not text.strip():
        raise UserError(f"{where}: the question is empty")
    for i, pair in enumerate(row.get("qa_pairs") or []):
        if not isinstance(pair, dict) or not isinstance(pair.get("short_answers"), list):
            raise UserError(
                f"{where}: qa_pairs item {i + 1} must be an object with the list short_answers"
            )
    choices, answers = _choices(where, row), _answers(where, row)
    labels = tuple(label for label, _ in choices)
    if choices:
        key = text_field(where, row, ("answerKey", "answer"), "")
        if key and key not in labels:
            raise UserError(
                f"{where}: answerKey {key!r} must be one of the labels {', '.join(labels)}"
            )
        answers = (key,) if key else ()
    options = labels or _options(where, row, answers)
    return Question(
        id=text_field(where, row, ("id", "q_id"), str(number)),
        question=text,
        answers=answers,
        ctxs=passages_from(where, row),
        choices=choices,
        options=options,
        task=task,
        extra={name: row[name] for name in _EXTRA_FIELDS if name in row},
    )


def _choices(where: str, row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    choices = row.get("choices")
    if not choices:
        return ()
    labels, texts = (
        (choices.get("label"), choices.get("text")) if isinstance(choices, dict) else (None, None)
    )
    if not isinstance(labels, list) or not isinstance(texts, list):
        raise UserError(f"{where}: field 'choices' must be an object with the lists label and text")
    if len(labels) != len(texts):
        raise UserError(f"{where}: choices has {len(labels)} labels for {len(texts)} texts")
    return tuple((str(label), str(text)) for label, text in zip(labels, texts, strict=True))


def _options(where: str, row: dict[str, Any], answers: tuple[str, ...]) -> tuple[str, ...]:
    options = row.get("options") or ()
    if not isinstance(options, (list, tuple)) or not all(
        isinstance(o, str) and o.strip() for o in options
    ):
        raise UserError(f"{where}: field 'options' must be a list of the possible answers")
    unknown = [a for a in answers if a not in options]
    if options and unknown:
        raise UserError(
            f"{where}: answer {unknown[0]!r} must be one of the options {', '.join(options)}"
        )
    return tuple(options)


def _answers(where: str, row: dict[str, Any]) -> tuple[str, ...]:
    for name in ("answers", "answer", "output"):
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, (list, tuple)):
            return (str(value),)
        if any(isinstance(v, (list, dict)) for v in value):
            raise UserError(f"{where}: field {name!r} must be a list of texts")
        return tuple(map(str, value))
    return ()
