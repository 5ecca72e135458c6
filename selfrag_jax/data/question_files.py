"""The rows of a question file: JSON, JSON lines, TSV, CSV or text, each also compressed (.gz).

.tsv, .csv   a header, then rows. Without a header: DPR's `question TAB list of answers`, and MMLU's
             `question,choice,...,letter`
.txt         one question a line
others       a JSON list, JSON lines, one JSON object, or ALCE's `{"data": [row, ...]}`
"""

from __future__ import annotations

import ast
import csv
import io
import json
import string
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfrag_jax.data.question_fields import QUESTION, ROWS
from selfrag_jax.errors import OnError, UserError, raise_error
from selfrag_jax.files import open_text
from selfrag_jax.json_lists import begins_list
from selfrag_jax.records import build_records, checked_row, read_rows
from selfrag_jax.retrieval.corpus_listing import kind_of

Row = dict[str, Any]

# A longer field is taken for an unclosed quote, which would swallow the rest of the file.
_MAX_FIELD = 1 << 22  # characters


def question_rows(path: str | Path, on_error: OnError = raise_error) -> Iterator[tuple[str, Row]]:
    """Yields ("file:line", row) of each row.

    on_error: takes the UserError of a malformed row, which names file and line. Raises UserError
    for a file that cannot be read on.
    """
    path = Path(path)
    suffix = kind_of(path)
    if suffix in (".tsv", ".csv"):
        yield from _table_rows(path, suffix, on_error)
    elif suffix == ".txt":
        yield from _text_rows(path)
    else:
        yield from _json_rows(path, suffix, on_error)


def parse_literal(where: str, name: str, text: str) -> Any:
    """Returns a list or object that is written as text, in JSON's or Python's spelling.

    Nothing is run. Raises UserError if it is neither, or holds what JSON cannot.
    """
    try:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = _python_literal(text.strip())
        # JSON has no tuples and no sets, and UTF-8 no unpaired surrogates.
        written = json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise UserError(
            f"{where}: field {name!r} holds {shown!r}, which is no list of JSON or Python; "
            "mend it, or write the field as a JSON list"
        ) from None
    return json.loads(written)


def _python_literal(text: str) -> Any:
    """Raises ValueError also for numpy's `['a' 'b']`, which Python reads as one text."""
    tree = ast.parse(text, mode="eval")
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    if len(nodes) != sum(t.type == tokenize.STRING for t in tokens):
        raise ValueError("texts without a comma between them")
    return ast.literal_eval(tree)


# ---- JSON ---------------------------------------------------------------------------------------
def _json_rows(path: Path, suffix: str, on_error: OnError) -> Iterator[tuple[str, Row]]:
    whole = _one_object(path, suffix)
    if whole is None:
        yield from read_rows(path, on_error=on_error)
        return
    name = next((n for n in ROWS if isinstance(whole.get(n), list)), None)
    if name is None:
        yield checked_row(f"{path}: item 1", whole)
        return
    items = ((f"{path}: {name} item {i}", row) for i, row in enumerate(whole[name], 1))
    for _, checked in build_records(items, checked_row, on_error):
        yield checked


def _one_object(path: Path, suffix: str) -> Row | None:
    """The object that the file consists of; None for a list and for JSON lines."""
    with open_text(path) as (f, _):
        if begins_list(f):
            return None  # its first line may be all of a large file
        first = next((line for line in f if line.strip()), "")
        if not first.lstrip().startswith("{"):
            return None
        try:
            row = json.loads(first)
            if not any(isinstance(row.get(n), list) for n in ROWS):
                return None  # the first of JSON lines
        except json.JSONDecodeError:
            pass  # it goes on in the next line
        except RecursionError:
            return None
        f.seek(0)
        try:
            whole = json.load(f)
        except json.JSONDecodeError as e:
            if suffix == ".json" and not e.msg.startswith("Extra data"):
                raise UserError(
                    f"{path}:{e.lineno}: not valid JSON ({e.msg} at column {e.colno})"
                ) from None
            return None
        except RecursionError:
            return None
    return whole if isinstance(whole, dict) else None


# ---- text and tables ----------------------------------------------------------------------------
def _text_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with open_text(path) as (f, _):
        for number, line in enumerate(f, 1):
            if line.strip():
                yield f"{path}:{number}", {"question": line.strip()}


def _table_rows(path: Path, suffix: str, on_error: OnError) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(_MAX_FIELD)
    with open_text(path, newline="") as (f, _):
        # DPR's .csv files are separated by tabs.
        delimiter = "\t" if suffix == ".tsv" or "\t" in f.readline() else ","
        f.seek(0)
        reader = csv.reader(f, delimiter=delimiter, strict=True)
        line = 1  # where the row begins
        header: list[str] | None = None
        try:
            for cells in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if not any(c.strip() for c in cells):
                    continue
                if header is None:
                    header, is_header = _header(where, cells)
                    if is_header:
                        continue
                try:
                    row = _table_row(where, header, cells, delimiter)
                except UserError as e:
                    on_error(e)
                else:
                    yield where, row
        except csv.Error as e:
            raise UserError(
                f"{path}:{line}: {e}; put a field that begins with a quote into quotes, and "
                "double the quotes within it"
            ) from None


def _header(where: str, cells: list[str]) -> tuple[list[str], bool]:
    """The names of the columns, and whether they are the file's first row."""
    names = [c.strip() for c in cells]
    if any(name in QUESTION for name in names):
        if twice := [n for n in names if n and names.count(n) > 1]:
            raise UserError(f"{where}: the column {twice[0]!r} occurs more than once")
        return names, True
    if len(names) == 2 and names[1].startswith("["):
        return ["question", "answers"], False
    letters = string.ascii_uppercase[: len(names) - 2]
    if len(names) >= 4 and names[-1] and names[-1] in letters:
        return ["question", *letters, "answer"], False
    raise UserError(
        f"{where}: no column is the question; expected a header with {' or '.join(QUESTION)}, "
        "or rows of a question and a list of answers"
    )


def _table_row(where: str, header: list[str], cells: list[str], delimiter: str) -> Row:
    if len(cells) != len(header):
        raise UserError(
            f"{where}: {len(cells)} columns, but the first row has {len(header)}; "
            f"quote fields that contain {'tabs' if delimiter == '	' else 'commas'}"
        )
    row: Row = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
    if header == ["question", "answers"] and "answers" in row:
        row["answers"] = parse_literal(where, "answers", row["answers"])
    return row
