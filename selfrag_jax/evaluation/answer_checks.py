"""Checks of rows of `selfrag answer`: damaged ones are refused before anything is computed.

A field that a row lacks is not checked, for the answers of other systems have fewer; who needs a
field asks for it.
"""

from __future__ import annotations

import math
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.records import passage_from
from selfrag_jax.text import reflection

Row = dict[str, Any]
_TEXTS = ("question", "answer", "system", "task", "error")
_NUMBERS = ("score", "p_retrieve", "p_sequence", "seconds", "num_tokens")
_CRITIQUES = {
    "isrel": reflection.ISREL,
    "issup": reflection.ISSUP,
    "isuse": reflection.ISUSE,
}


def check_answer(where: str, row: Row) -> None:
    """Raises UserError naming the first field whose value is of another form than ours."""
    for name in _TEXTS:
        require_text(where, row, name)
    for name in _NUMBERS:
        if row.get(name) is not None:
            require_number(where, row, name)
    if "retrieved" in row and row["retrieved"] not in (True, False):
        raise UserError(f"{where}: field 'retrieved' must be true or false")
    segments, citations, passages, tree = (
        _objects(where, row, name) for name in ("segments", "citations", "passages", "tree")
    )
    for i, p in enumerate(passages):
        passage_from(where, p, i)
    for i, segment in enumerate(segments):
        _check_segment(f"{where}: segment {i + 1}", segment)
    counts = {"segment": len(segments), "passage": len(passages)}
    for c in citations:
        for name, count in counts.items():
            if type(c.get(name)) is not int or not 0 <= c[name] < count:
                raise UserError(
                    f"{where}: a citation names {name} {c.get(name)!r} of {count}, counted from 0"
                )
    for i, node in enumerate(tree):
        passage = node.get("passage")
        if passage is not None and not (isinstance(passage, dict) and "id" in passage):
            raise UserError(f"{where}: tree node {i + 1}: passage must be an object with an id")


def require_text(where: str, row: Row, name: str) -> None:
    if not isinstance(row.get(name, ""), str):
        raise UserError(f"{where}: field {name!r} must be text, found {str(row[name])[:40]!r}")


def require_number(where: str, row: Row, name: str) -> None:
    """Raises UserError unless the field is a number that a float can hold; NaN is one."""
    if not is_number(row[name]):
        raise UserError(f"{where}: field {name!r} must be a number, found {str(row[name])[:40]!r}")


def is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        float(value)
    except OverflowError:  # JSON has integers of any size
        return False
    return True


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _objects(where: str, row: Row, name: str) -> list[Row]:
    value = row.get(name, [])
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        raise UserError(f"{where}: field {name!r} must be a list of objects")
    return value


def _check_segment(where: str, segment: Row) -> None:
    if "text" not in segment:
        raise UserError(f"{where} has no text")
    require_text(where, segment, "text")
    for name, tokens in _CRITIQUES.items():
        said = segment.get(name) or {}
        if not isinstance(said, dict) or (said and not all(is_finite(said.get(t)) for t in tokens)):
            raise UserError(
                f"{where}: field {name!r} must hold a finite number for each of {', '.join(tokens)}"
            )
