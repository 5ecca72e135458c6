"""Checks of files for other projects' judges; they hold for files of any origin.

They refuse what a judge would stumble over, or score silently as something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.answer_rows import require_finite
from selfrag_jax.evaluation.citation_marks import MARKS_PER_SENTENCE
from selfrag_jax.files import open_text
from selfrag_jax.text.sentences import split_sentences

Item = dict[str, Any]
Placed = Sequence[tuple[str, Item]]  # rows, each with its place for errors
_MARK = re.compile(r"\[(\d+)")
_MARK_AFTER_STOP = re.compile(r"[.!?][\"'”’»)\]}]*\s*\[\d+")


# ---- the formats ---------------------------------------------------------------------------------
def check_alce(file: str | Path) -> int:
    """Returns the number of items of a file that ALCE's eval.py reads as it is meant.

    Raises UserError naming item and field otherwise; so do the other checks.
    """
    return require_alce(_items_of(file, "data"))


def check_factscore(file: str | Path) -> int:
    """Returns the number of rows of a file that FActScore takes."""
    return require_factscore(_lines_of(file))


def check_kilt(file: str | Path) -> int:
    """Returns the number of rows of a file of KILT predictions."""
    return require_kilt(_lines_of(file))


def check_ragchecker(file: str | Path) -> int:
    """Returns the number of rows of a file of RAGChecker's results."""
    return require_ragchecker(_items_of(file, "results"))


def require_alce(items: Placed) -> int:
    """Raises UserError naming the first wrong item and field; returns the number of items."""
    for where, item in items:
        _require_alce_item(where, item)
    # eval.py looks at the first item, and fails at another one that lacks what that has.
    for name in ("answer or annotations", "qa_pairs", "claims", "answers"):
        having = [any(n in item for n in name.split(" or ")) for _, item in items]
        if any(having) and not all(having):
            where = items[having.index(False)][0]
            raise UserError(f"{where}: missing field {name!r}, which other items have")
    return len(items)


def require_factscore(rows: Placed) -> int:
    for where, row in rows:
        _text(where, row, "topic")
        output = _text(where, row, "output", may_be_empty=True)
        if output and not output.strip():
            raise UserError(f"{where}: field 'output' is white space; \"\" abstains")
        if mark := _MARK.search(output):
            raise UserError(f"{where}: field 'output' has the citation mark {mark[0]}]; strip it")
    return len(rows)


def require_kilt(rows: Placed) -> int:
    _require_distinct(rows, "id")
    for where, row in rows:
        outputs = _list(where, row, "output")
        if len(outputs) != 1:
            raise UserError(f"{where}: field 'output' must hold one answer, found {len(outputs)}")
        _text(where, outputs[0], "answer", may_be_empty=True)
        for i, page in enumerate(_list(where, outputs[0], "provenance"), 1):
            _text(f"{where}: provenance {i}", page, "wikipedia_id")
    return len(rows)


def require_ragchecker(rows: Placed) -> int:
    _require_distinct(rows, "query_id")
    for where, row in rows:
        _text(where, row, "query")
        _text(where, row, "gt_answer")
        _text(where, row, "response", may_be_empty=True)
        for i, passage in enumerate(_list(where, row, "retrieved_context"), 1):
            _text(f"{where}: retrieved_context {i}", passage, "doc_id")
            _text(f"{where}: retrieved_context {i}", passage, "text", may_be_empty=True)
    return len(rows)


def _require_alce_item(where: str, item: Item) -> None:
    _text(where, item, "question")
    output = _text(where, item, "output", may_be_empty=True)
    docs = _list(where, item, "docs")
    for i, doc in enumerate(docs, 1):
        _text(f"{where}: docs {i}", doc, "title", may_be_empty=True)
        _text(f"{where}: docs {i}", doc, "text", may_be_empty=True)
    _require_good_marks(where, output, len(docs))
    if "answer" in item:
        _text(where, item, "answer")
    if "annotations" in item:
        annotations = _list(where, item, "annotations")
        if len(annotations) < 2:
            raise UserError(f"{where}: field 'annotations' must hold at least 2")
        for i, annotation in enumerate(annotations, 1):
            _text(f"{where}: annotations {i}", annotation, "long_answer", may_be_empty=True)
    if "qa_pairs" in item:
        for i, pair in enumerate(_list(where, item, "qa_pairs", may_be_empty=False), 1):
            _texts(f"{where}: qa_pairs {i}", pair, "short_answers")
    if "claims" in item:
        _texts(where, item, "claims")
    if "answers" in item:
        for i, group in enumerate(_list(where, item, "answers", may_be_empty=False), 1):
            _texts(where, {f"answers {i}": group}, f"answers {i}")


def _require_good_marks(where: str, output: str, num_docs: int) -> None:
    where = f"{where}: field 'output'"
    if len(output.strip().splitlines()) > 1:
        raise UserError(f"{where} must be one line; ALCE cuts it at the first line break")
    if m := _MARK_AFTER_STOP.search(output):
        raise UserError(
            f"{where} has the mark {m[0][m[0].rindex('[') :]}] after a full stop; it would count "
            "for the next sentence"
        )
    for n in _MARK.findall(output):
        if len(n) > 9 or not 1 <= int(n) <= num_docs:
            n = n if len(n) <= 9 else f"{n[:9]}…"
            raise UserError(f"{where} has the mark [{n}]; its docs are [1] to [{num_docs}]")
    for sentence in split_sentences(output):
        if len(_MARK.findall(sentence)) > MARKS_PER_SENTENCE:
            raise UserError(
                f"{where} has more than {MARKS_PER_SENTENCE} marks in {sentence.strip()[:60]!r}"
            )


# ---- reading and fields --------------------------------------------------------------------------
def _items_of(file: str | Path, name: str) -> list[tuple[str, Item]]:
    """The items of a JSON object's list `name`, each with its place."""
    with open_text(file) as (f, _):
        try:
            content = json.load(f)
        except json.JSONDecodeError as e:
            raise UserError(f"{file}: not valid JSON: {e}") from None
        except RecursionError:
            raise UserError(f"{file}: nested too deeply") from None
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise UserError(f"{file}: must be a JSON object with the list {name!r}")
    return _checked(file, ((f"{file}: {name} {i}", v) for i, v in enumerate(content[name], 1)))


def _lines_of(file: str | Path) -> list[tuple[str, Item]]:
    """The rows of a file of JSON lines; a blank line is none to the judges."""
    found = []
    with open_text(file) as (f, _):
        for number, line in enumerate(f, 1):
            try:
                found.append((f"{file}:{number}", json.loads(line)))
            except json.JSONDecodeError as e:
                raise UserError(f"{file}:{number}: not a line of JSON ({e.msg})") from None
            except RecursionError:
                raise UserError(f"{file}:{number}: nested too deeply") from None
    return _checked(file, found)


def _checked(file: str | Path, items: Iterable[tuple[str, Any]]) -> list[tuple[str, Item]]:
    found = list(items)
    if not found:
        raise UserError(f"{file}: holds no rows")
    for where, item in found:
        if not isinstance(item, dict):
            raise UserError(f"{where}: must be an object")
        require_finite(where, item)
    return found


def _require_distinct(rows: Sequence[tuple[str, Item]], name: str) -> None:
    seen: set[str] = set()
    for where, row in rows:
        key = _text(where, row, name)
        if key in seen:
            raise UserError(f"{where}: {name} {key!r} occurs more than once")
        seen.add(key)


def _text(where: str, row: Any, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(row, dict) or name not in row:
        raise UserError(f"{where}: missing field {name!r}")
    value = row[name]
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        what = "is empty" if isinstance(value, str) else f"is {type(value).__name__}"
        raise UserError(f"{where}: field {name!r} {what}; expected text")
    return value


def _list(where: str, row: Any, name: str, may_be_empty: bool = True) -> list[Any]:
    if not isinstance(row, dict) or name not in row:
        raise UserError(f"{where}: missing field {name!r}")
    if not isinstance(row[name], list) or not (may_be_empty or row[name]):
        raise UserError(f"{where}: field {name!r} must be a list with something in it")
    return row[name]


def _texts(where: str, row: Any, name: str) -> None:
    if not all(isinstance(v, str) for v in _list(where, row, name, may_be_empty=False)):
        raise UserError(f"{where}: field {name!r} must be a list of texts")
