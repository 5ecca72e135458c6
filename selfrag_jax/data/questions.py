"""Reads question files in their published layouts into one record, Question.

question_fields.py has the table of layouts and field names, question_files.py the file formats,
gold_answers.py what a row says about the right answer. A question without gold is read: answering
needs none, and metrics refuse it by its id.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, TypeGuard

from selfrag_jax.data import question_fields as fields
from selfrag_jax.data.gold_answers import read_gold
from selfrag_jax.data.question_files import parse_literal, question_rows
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, Question, passages_from, text_field

Row = dict[str, Any]


def read_questions(path: str | Path, task: str = "") -> list[Question]:
    """Returns all questions of a file.

    task: name of the task; "" takes the file's. Claims whose label is neither true nor false (not
    enough info, mixture) are left out, with a word on stderr: the paper's task has two answers.
    Raises UserError with file, line and field if a row is malformed, and if the file has no
    questions.
    """
    task = task or Path(Path(path).name.removesuffix(".gz")).stem
    questions: list[Question] = []
    undecided: list[str] = []
    for number, (where, row) in enumerate(question_rows(path)):
        question, label = question_from(where, row, task, number)
        if label:
            undecided.append(label)
        else:
            questions.append(question)
    if undecided:
        print(
            f"{path}: left out {len(undecided):,} of {len(undecided) + len(questions):,} claims "
            f"that are neither true nor false ({', '.join(sorted(set(undecided))[:4])})",
            file=sys.stderr,
        )
    if not questions:
        raise UserError(f"{path}: holds no rows" + (" that can be asked" if undecided else ""))
    return questions


def question_from(where: str, row: Row, task: str, number: int) -> tuple[Question, str]:
    """Returns the question of a row, and the label of a claim that cannot be asked, else "".

    number: the row's, its id if it has no other.
    """
    name, text, input_text = question_and_input(where, row)
    gold = read_gold(where, row, name == "claim")
    extra = _extra(where, row)
    if gold.groups:
        extra[fields.ANSWER_GROUPS] = [list(group) for group in gold.groups]
    if gold.numbered:
        extra[fields.NUMBERED] = gold.numbered
    made = Question(
        id=_row_id(where, row, number),
        question=text,
        answers=gold.answers,
        ctxs=_passages(where, row),
        choices=gold.choices,
        options=gold.options,
        task=task,
        extra=extra,
        input=input_text,
    )
    return made, gold.undecided


def question_and_input(where: str, row: Row) -> tuple[str, str, str]:
    """Returns the name of the field with the question, the question, and the prompt's input.

    Raises UserError if there is no question, naming the fields that were looked for.
    """
    name = next((n for n in fields.QUESTION if row.get(n) is not None), "")
    if name and isinstance(row[name], dict):
        text = text_field(f"{where}: field {name!r}", row[name], fields.STEM)
    else:
        text = text_field(where, row, fields.QUESTION)
    if not text.strip():
        raise UserError(f"{where}: the question is empty (field {name!r})")
    return name, text, text_field(where, row, "input", "") if name == "instruction" else ""


def _row_id(where: str, row: Row, number: int) -> str:
    """The row's id; its number if the row has no field for one."""
    id_ = text_field(where, row, fields.ID, str(number))
    if not id_.strip():
        raise UserError(f"{where}: the id is empty; fill it in, or remove the field from all rows")
    return id_


# ---- passages -----------------------------------------------------------------------------------
def _passages(where: str, row: Row) -> tuple[Passage, ...]:
    if found := passages_from(where, _parsed(where, row, fields.PASSAGES)):
        return found
    row = _parsed(where, row, fields.CONTEXT)
    name = next((n for n in fields.CONTEXT if row.get(n)), "")
    if not name:
        return ()
    value = row[name]
    if isinstance(value, str):  # SQuAD, BoolQ
        return (Passage("0", text_field(where, row, "title", ""), value),)
    if isinstance(value, dict) and "title" in value and "sentences" in value:
        titles, sentences = value["title"], value["sentences"]
        if not isinstance(titles, list) or not isinstance(sentences, list):
            raise UserError(f"{where}: field {name!r}: title and sentences must be lists")
        if len(titles) != len(sentences):
            raise UserError(
                f"{where}: {name} has {len(titles)} titles for {len(sentences)} passages"
            )
        value = list(zip(titles, sentences, strict=True))
    if not isinstance(value, list):
        raise UserError(
            f"{where}: field {name!r} must be text or a list of passages, "
            f"found {type(value).__name__}"
        )
    return tuple(
        _context_passage(f"{where}: {name} item {i + 1}", p, i) for i, p in enumerate(value)
    )


def _parsed(where: str, row: Row, names: tuple[str, ...]) -> Row:
    """The row with those of its fields `names` parsed that are lists written as text."""
    texts = {n: row[n] for n in names if isinstance(row.get(n), str)}
    lists = {n: t for n, t in texts.items() if t.lstrip().startswith(("[{", "[["))}
    return row | {n: parse_literal(where, n, t) for n, t in lists.items()}


def _context_passage(where: str, item: Any, number: int) -> Passage:
    """A passage of HotpotQA ([title, [sentence]]), of MuSiQue (an object), or plain text."""
    if isinstance(item, str):
        return Passage(str(number), "", item)
    if isinstance(item, dict):
        text = text_field(where, item, ("text", "paragraph_text", "contents"))
        id_ = text_field(where, item, ("id", "idx"), str(number))
        return Passage(id_, text_field(where, item, "title", ""), text)
    if isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], str):
        title, sentences = item
        if isinstance(sentences, str):
            return Passage(str(number), title, sentences)
        if isinstance(sentences, (list, tuple)) and all(isinstance(s, str) for s in sentences):
            # HotpotQA's sentences begin with their space, 2WikiMultihopQA's do not.
            return Passage(str(number), title, " ".join(s.strip() for s in sentences))
    raise UserError(f"{where}: expected [title, [sentence, ...]], an object with text, or text")


# ---- what metrics need --------------------------------------------------------------------------
def _extra(where: str, row: Row) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    row = _parsed(where, row, ("qa_pairs", "annotations"))
    if pairs := row.get("qa_pairs"):
        _check_qa_pairs(where, pairs)
        extra["qa_pairs"] = pairs
    annotations = row.get("annotations")
    if _is_list_of(annotations, dict) and all("long_answer" in a for a in annotations):
        extra["annotations"] = annotations  # ALCE's; FActScore's are of another kind
    facts = row.get("facts")
    if _is_list_of(facts, list) and all(len(f) == 2 and _is_list_of(f, str) for f in facts):
        extra["facts"] = facts  # StrategyQA's are plain text
    if _is_list_of(row.get("claims"), str):
        extra["claims"] = row["claims"]
    extra |= {name: row[name] for name in ("topic", "cat") if row.get(name)}
    name = next((n for n in fields.POPULARITY if row.get(n) is not None), "")
    if name:
        extra["popularity"] = _number(where, name, row[name])
        if row.get(fields.DECILE) is not None:
            extra[fields.DECILE] = _number(where, fields.DECILE, row[fields.DECILE])
    return extra


def _is_list_of(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and bool(value) and all(isinstance(v, kind) for v in value)


def _check_qa_pairs(where: str, pairs: Any) -> None:
    if not isinstance(pairs, list):
        raise UserError(f"{where}: field 'qa_pairs' must be a list of objects with short_answers")
    for i, pair in enumerate(pairs):
        short = pair.get("short_answers") if isinstance(pair, dict) else None
        if not isinstance(short, list) or not all(isinstance(s, str) for s in short):
            raise UserError(
                f"{where}: qa_pairs item {i + 1} must be an object with the list short_answers"
            )


def _number(where: str, name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):  # JSON has integers of any size
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: field {name!r} must be a number, found {str(value)[:40]!r}")
    return number
