"""Evaluation files in their published formats, read into one record.

short form       question | instruction, answers | answer | output, ctxs | top_contexts | docs
multiple choice  question, choices {label, text}, answerKey (ARC; labels may be 1-4, three or five options)
closed set       short form with options, the list of the only possible answers (claims: ["true", "false"])
several parts    question, qa_pairs [{short_answers}] (ALCE)
biographies      input, topic, cat (FactScore); our world adds its facts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.records import Question, passages_from, read_records, text_field


def read_questions(path: str | Path, task: str = "") -> list[Question]:
    """All questions of a file. Raises BadInput naming file, line and field; also for a file without questions."""
    task = task or Path(path).stem
    number = iter(range(1 << 62))
    return read_records(path, lambda where, row: _question(where, row, task, next(number)))


def _question(where: str, row: dict[str, Any], task: str, number: int) -> Question:
    text = text_field(where, row, ("question", "instruction", "input"))
    if not text.strip():
        raise UserError(f"{where}: the question is empty")
    extra = {k: row[k] for k in ("qa_pairs", "facts", "topic", "cat", "annotations") if k in row}
    for i, pair in enumerate(row.get("qa_pairs") or []):
        if not isinstance(pair, dict) or not isinstance(pair.get("short_answers"), list):
            raise UserError(
                f"{where}: qa_pairs item {i + 1} must be an object with the list short_answers"
            )
    choices, answers = _choices(where, row), _answers(where, row)
    if choices:
        key = text_field(where, row, ("answerKey", "answer"), "")
        if key and key not in [label for label, _ in choices]:
            raise UserError(
                f"{where}: answerKey {key!r} is none of the labels {', '.join(c for c, _ in choices)}"
            )
        answers = (key,) if key else ()
    options = tuple(label for label, _ in choices) or _options(where, row, answers)
    return Question(
        id=text_field(where, row, ("id", "q_id"), str(number)),
        question=text,
        answers=answers,
        ctxs=passages_from(where, row),
        choices=choices,
        options=options,
        task=task,
        extra=extra,
    )


def _choices(where: str, row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    choices = row.get("choices")
    if not choices:
        return ()
    if (
        not isinstance(choices, dict)
        or not isinstance(choices.get("label"), list)
        or not isinstance(choices.get("text"), list)
    ):
        raise UserError(f"{where}: field 'choices' must be an object with the lists label and text")
    if len(choices["label"]) != len(choices["text"]):
        raise UserError(
            f"{where}: choices has {len(choices['label'])} labels for {len(choices['text'])} texts"
        )
    return tuple(
        (str(label), str(text))
        for label, text in zip(choices["label"], choices["text"], strict=True)
    )


def _options(where: str, row: dict[str, Any], answers: tuple[str, ...]) -> tuple[str, ...]:
    options = row.get("options") or ()
    if not isinstance(options, (list, tuple)) or not all(
        isinstance(o, str) and o.strip() for o in options
    ):
        raise UserError(f"{where}: field 'options' must be a list of the possible answers")
    if options and (strange := [a for a in answers if a not in options]):
        raise UserError(
            f"{where}: answer {strange[0]!r} is none of the options {', '.join(options)}"
        )
    return tuple(options)


def _answers(where: str, row: dict[str, Any]) -> tuple[str, ...]:
    for name in ("answers", "answer", "output"):
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, (list, tuple)):
            if any(isinstance(v, (list, dict)) for v in value):
                raise UserError(f"{where}: field {name!r} must be a list of texts")
            return tuple(map(str, value))
        return (str(value),)
    return ()
