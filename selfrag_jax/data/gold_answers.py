"""The gold answers, choices and closed set of a question's row, in the published layouts.

Claims are answered with true or false, whatever their labels are called; questions whose gold is a
JSON true or false with yes or no, the alias being true or false. Choices are lettered from A where
the file numbers them or leaves them without labels, as the released scripts do.
"""

from __future__ import annotations

import json
import math
import string
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from selfrag_jax.data import question_fields as fields
from selfrag_jax.data.question_files import parse_literal
from selfrag_jax.errors import UserError

Row = dict[str, Any]
Choices = tuple[tuple[str, str], ...]

VERDICTS = {"supports": "true", "refutes": "false", "true": "true", "false": "false"}
_LETTERS = string.ascii_uppercase
CLAIM_OPTIONS = ("true", "false")
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Gold:
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    choices: Choices = ()
    groups: tuple[tuple[str, ...], ...] = ()  # QAMPARI: one for each answer, of its aliases
    undecided: str = ""  # a claim's label that is neither true nor false
    numbered: str = ""  # the right choice's label as the file has it, where that is a number


def read_gold(where: str, row: Row, is_claim: bool) -> Gold:
    """Returns what a row says about the right answer; empty if it says nothing.

    Raises UserError naming the field if it is malformed, or if the answer is none of the options.
    """
    if choices := _choices(where, row):
        return _choice_gold(where, row, choices)
    if _is_foreign_output(row):
        row = {k: v for k, v in row.items() if k != "output"}
    name, values = _first_gold(where, row)
    in_groups = name == "answer_list" or any(isinstance(v, (list, tuple)) for v in values)
    values = [_parts(where, name, v) if isinstance(v, dict) else v for v in values]
    flat = [x for v in values for x in (v if isinstance(v, (list, tuple)) else [v])]
    listed = _options(where, row)
    if not listed and (is_claim or (flat and all(v in ("SUPPORTS", "REFUTES") for v in flat))):
        return _claim_gold(where, name, flat)
    if flat and all(isinstance(v, bool) for v in flat):
        return _yes_or_no(where, name, bool(flat[0]), listed)
    if name == "label" and any(not isinstance(v, str) for v in flat):
        raise UserError(
            f"{where}: field 'label': {flat[0]!r} is a number without choices; write the label's "
            "text"
        )
    groups = [_texts(where, name, v) for v in values]
    answers = tuple(dict.fromkeys(a for group in groups for a in group))
    if listed and (unknown := [a for a in answers if a not in listed]):
        raise UserError(
            f"{where}: answer {unknown[0]!r} must be one of the options {', '.join(listed)}"
        )
    kept = tuple(tuple(g) for g in groups if g) if in_groups else ()
    return Gold(answers, listed, (), kept)


def _is_foreign_output(row: Row) -> bool:
    """Whether this is a row of FActScore, whose output is another model's text."""
    asks_itself = row.get("question") or row.get("instruction")
    return bool(row.get("topic")) and ("cat" in row or not asks_itself)


def _first_gold(where: str, row: Row) -> tuple[str, list[Any]]:
    """The field that has the gold, and its values without empty ones."""
    for name in fields.GOLD:
        value = row.get(name)
        if isinstance(value, str) and name in fields.GOLD_LISTS and value.lstrip()[:1] == "[":
            value = parse_literal(where, name, value)
        if isinstance(value, dict):
            value = _parts(where, name, value)
        values = value if isinstance(value, (list, tuple)) else [value]
        if kept := [v for v in values if not _is_empty(v)]:
            for more in fields.MORE_GOLD:
                aliases = row.get(more) or []
                kept += aliases if isinstance(aliases, list) else [aliases]
            return name, kept
    return "", []


def _is_empty(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _parts(where: str, name: str, value: Row) -> list[Any]:
    """The texts of an answer that is an object, such as TriviaQA's."""
    if not value:
        return []
    known = [part for part in fields.ANSWER_PARTS if part in value]
    if not known and "provenance" not in value:
        raise UserError(
            f"{where}: field {name!r} is an object without {' or '.join(fields.ANSWER_PARTS)} "
            f"(it has: {', '.join(sorted(value))})"
        )
    found: list[Any] = []
    for part in known:
        found += value[part] if isinstance(value[part], list) else [value[part]]
    return found


def _texts(where: str, name: str, value: Any) -> list[str]:
    """One item of the gold, text or a list of aliases, as different texts that are not empty."""
    texts: list[str] = []
    for v in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(v, (list, tuple, dict)):
            raise UserError(f"{where}: field {name!r} must be a list of texts, or of their aliases")
        if isinstance(v, bool):
            texts.append(YES_NO[not v])
        elif not _is_empty(v) and str(v).strip():
            texts.append(str(v))
    return list(dict.fromkeys(texts))


# ---- closed sets --------------------------------------------------------------------------------
def _options(where: str, row: Row) -> tuple[str, ...]:
    options = row.get("options") or ()
    if not isinstance(options, (list, tuple)) or not all(
        isinstance(o, str) and o.strip() for o in options
    ):
        raise UserError(f"{where}: field 'options' must be a list of the possible answers")
    return tuple(options)


def _claim_gold(where: str, name: str, values: list[Any]) -> Gold:
    """A claim's gold: true or false."""
    if not values:
        return Gold(options=CLAIM_OPTIONS)
    label = values[0]
    if isinstance(label, bool):
        return Gold((CLAIM_OPTIONS[not label],), CLAIM_OPTIONS)
    if not isinstance(label, str):
        raise UserError(
            f"{where}: field {name!r}: {label!r} means different things in different data sets; "
            "write true or false, or SUPPORTS or REFUTES"
        )
    verdict = VERDICTS.get(label.strip().rstrip(".").lower())
    if verdict is None:
        return Gold(options=CLAIM_OPTIONS, undecided=label)
    return Gold((verdict,), CLAIM_OPTIONS)


def _yes_or_no(where: str, name: str, value: bool, listed: tuple[str, ...]) -> Gold:
    """The gold of a JSON true or false: yes or no, or of the row's own options."""
    wanted = ("yes", "true") if value else ("no", "false")
    if not listed:
        return Gold(wanted, YES_NO)
    answers = tuple(o for o in listed if o.strip().rstrip(".").lower() in wanted)
    if not answers:
        raise UserError(
            f"{where}: {name} {json.dumps(value)} is none of the options {', '.join(listed)}"
        )
    return Gold(answers, listed)


# ---- multiple choice ----------------------------------------------------------------------------
def _choices(where: str, row: Row) -> Choices:
    """(label, text) of each choice as the file has them."""
    name, value = _choice_field(row)
    if not value:
        return _choice_columns(row)
    if isinstance(value, str):
        value = parse_literal(where, name, value)
    labels: Any
    texts: Any
    if isinstance(value, list) and all(isinstance(c, dict) for c in value):
        labels, texts = [c.get("label") for c in value], [c.get("text") for c in value]
    elif isinstance(value, list):
        labels, texts = list(_LETTERS[: len(value)]), value
    else:
        labels, texts = (
            (value.get("label"), value.get("text")) if isinstance(value, dict) else (None, None)
        )
    if not isinstance(labels, list) or not isinstance(texts, list):
        raise UserError(
            f"{where}: field {name!r} must be an object with the lists label and text, or a list "
            "of texts or of such objects"
        )
    if len(labels) != len(texts):
        raise UserError(f"{where}: {name} has {len(labels)} labels for {len(texts)} texts")
    for given in (*labels, *texts):
        if not isinstance(given, (str, int, float)):
            raise UserError(f"{where}: field {name!r} holds {given!r}; expected text")
    names = [str(label) for label in labels]
    if twice := [label for label in names if names.count(label) > 1]:
        raise UserError(f"{where}: field {name!r} has the label {twice[0]!r} more than once")
    return tuple(zip(names, map(str, texts), strict=True))


def _choice_field(row: Row) -> tuple[str, Any]:
    """The field of the choices: `choices`, or `options` whose answer is a letter or a position."""
    question, options = row.get("question"), row.get("options")
    if row.get("choices"):
        return "choices", row["choices"]
    if isinstance(question, dict) and question.get("choices"):
        return "choices", question["choices"]
    if isinstance(options, dict):  # MedQA
        return "options", {"label": list(options), "text": list(options.values())}
    if isinstance(options, list) and options:  # MMLU-Pro, RACE
        key = row.get("answer")
        is_letter = isinstance(key, str) and key != "" and key in _LETTERS[: len(options)]
        if "answer_index" in row or (is_letter and key not in options):
            return "options", options
    return "choices", None


def _choice_columns(row: Row) -> Choices:
    """The choices of a row with the columns A, B, C and so on (MMLU)."""
    if not (row.get("A") and row.get("B")):
        return ()
    letters = takewhile(lambda c: not _is_empty(row.get(c)), _LETTERS)
    return tuple((c, str(row[c])) for c in letters)


def _choice_gold(where: str, row: Row, choices: Choices) -> Gold:
    labels, texts = tuple(c[0] for c in choices), [c[1] for c in choices]
    right = _right_choice(where, row, labels, texts)
    letters = lettered(labels)
    choices = tuple(zip(letters, texts, strict=True))
    if right is None:
        return Gold((), letters, choices)
    numbered = labels[right] if letters != labels else ""
    return Gold((letters[right],), letters, choices, numbered=numbered)


def lettered(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Returns A, B, C and so on for labels that are numbers, as prompts show them; else themselves.

    So do the released scripts.
    """
    if all(label.isdecimal() for label in labels) and len(labels) <= len(_LETTERS):
        return tuple(_LETTERS[: len(labels)])
    return labels


def _right_choice(where: str, row: Row, labels: tuple[str, ...], texts: list[str]) -> int | None:
    """The position of the right choice, which rows name by label, position (MMLU) or text."""
    name, value = _choice_key(row)
    if value is None:
        return None
    key = str(value)
    if key in labels:
        return labels.index(key)
    by_text = texts.index(key) if isinstance(value, str) and key in texts else None
    is_position = key.isdecimal() and len(key) < 4 and name != "answerKey"
    position = int(key) if is_position else len(texts)
    by_position = position if position < len(texts) else None
    if by_text is None and by_position is None:
        raise UserError(f"{where}: {name} {key!r} must be one of the labels {', '.join(labels)}")
    if None not in (by_text, by_position) and by_text != by_position:
        raise UserError(
            f"{where}: {name} {key!r} is the text of one choice and the position of another; "
            f"write the label, one of {', '.join(labels)}"
        )
    return by_position if by_text is None else by_text


def _choice_key(row: Row) -> tuple[str, str | int | None]:
    """The field that says which choice is right, and its value; None without one."""
    for name in fields.CHOICE_KEY:
        value = row.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return name, value
    return "", None
