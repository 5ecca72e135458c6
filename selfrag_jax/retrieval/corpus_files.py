"""The documents in the files of a corpus.

- .tsv, .csv: a header with `text` and, if there are any, `id` and `title`; quoted as Python's csv
  module does it (DPR's psgs_w100.tsv). A .csv is separated by commas, semicolons or tabs.
- .jsonl (.ndjson, .json): an id, a text and a title, as BEIR, Pyserini, FlashRAG and Tevatron name
  them, and some other names (TEXT, TITLE, ID).
- .txt, .md, .rst: one document a file. Its name is the id; the title is a .md file's first heading,
  or the name without its suffix.
- a folder: all of these in it and below.

All may be compressed (.gz). Ids are kept as the file has them.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from selfrag_jax.errors import OnError, UserError, raise_error
from selfrag_jax.files import open_text
from selfrag_jax.records import PASSAGE_ID_FIELDS, PASSAGE_TEXT_FIELDS, read_rows, text_field
from selfrag_jax.retrieval.corpus_listing import DOCUMENTS, TABLES, kind_of
from selfrag_jax.text.splitting import first_heading

ID = (*PASSAGE_ID_FIELDS, "url")
TEXT = (*PASSAGE_TEXT_FIELDS, "body", "passage", "passage_text", "document")
TITLE = ("title", "heading", "headline")
# A longer field is taken for an unclosed quote, which would swallow the rest of the file.
_MAX_FIELD = 1 << 26  # characters

Fields = Mapping[str, str]  # what the file calls "id", "text" and "title", where it was said


class Document(NamedTuple):
    """What a row or a file holds, before it is split into passages."""

    where: str  # "file:line"
    id: str
    title: str
    text: str
    has_id: bool = True  # or else its number stands for one
    is_file: bool = False  # a whole .txt, .md or .rst
    is_markdown: bool = False


def documents(
    path: Path,
    name: str,
    fields: Fields,
    at: Callable[[int], None],
    on_error: OnError = raise_error,
) -> Iterator[Document]:
    """Yields the documents of one file.

    name: of the file within its folder, "" for a single file; begins the ids of rows without an id.
    at: called with the number of bytes of the file on disk that were read. on_error: takes the
    UserErrors of rows, which name file and line: a missing field, an empty id. Raises UserError for
    a file that cannot be read on.
    """
    kind = kind_of(path)
    if kind in DOCUMENTS:
        yield _text_document(path, name, kind == ".md")
        return
    start, said = f"{name}:" if name else "", tuple(fields.items())
    is_table = kind in TABLES
    rows = _table_rows(path, fields, at, on_error) if is_table else read_rows(path, at, on_error)
    names = None
    for number, (where, row) in enumerate(rows):
        if names is None or not is_table:  # all rows of a table have its columns
            names = _names(tuple(row), said)
        try:
            document = _from_row(where, row, f"{start}{number}", names)
        except UserError as e:
            on_error(e)
        else:
            yield document


def _text_document(path: Path, name: str, is_markdown: bool) -> Document:
    with open_text(path) as (f, _):
        text = f.read()
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: holds a NUL byte; is it a text file, and in UTF-8?")
    first = text.partition("\n")[0].rstrip("\r").split("\t")
    if "id" in first and "text" in first:
        raise UserError(f"{path}:1: begins as a table does; rename it to .tsv to have its rows")
    title = first_heading(text) if is_markdown else ""
    # File names need not be UTF-8.
    id_ = os.fsencode(name or path.name).decode("utf-8", "replace")
    stem = id_.rpartition("/")[2].removesuffix(".gz")
    title = title or Path(stem).stem
    return Document(str(path), id_, title, text, is_file=True, is_markdown=is_markdown)


class _Names(NamedTuple):
    """The fields of a row that may hold its id, text and title, as it spells them."""

    id: tuple[str, ...]
    text: tuple[str, ...]
    title: tuple[str, ...]
    missing: tuple[str, str] | None  # (role, field): what the row should have


@lru_cache(maxsize=256)  # most rows of a file have the same fields
def _names(row: tuple[str, ...], said: tuple[tuple[str, str], ...]) -> _Names:
    """said: `fields` as pairs."""
    fields, missing = dict(said), None
    found = {
        role: _present(row, (fields[role],) if role in fields else usual)
        for role, usual in (("id", ID), ("text", TEXT), ("title", TITLE))
    }
    for role in ("id", "text"):
        # A corpus of titles alone is a mistake.
        if not found[role] and (role == "text" or role in fields):
            missing = (role, fields.get(role, role))
    return _Names(**found, missing=missing)


def _present(row: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Those of some fields that a row has, as it spells them."""
    if found := tuple(n for n in names if n in row):
        return found
    spelt = {key.strip().casefold(): key for key in row}
    return tuple(spelt[n.casefold()] for n in names if n.casefold() in spelt)


def _from_row(where: str, row: dict[str, Any], number: str, names: _Names) -> Document:
    """A document from a row; `number` is the id of one without."""
    if names.missing:
        role, wanted = names.missing
        raise UserError(
            f"{where}: missing field {wanted!r} (the row has: {', '.join(row) or 'nothing'}); "
            f"name the field of the {role}: --fields={role}=NAME"
        )
    text = _field(where, row, names.text) or ""
    title = _field(where, row, names.title) or ""
    # FlashRAG and Pyserini put the title into `contents`, as a quoted first line.
    if names.text[0] == "contents" and not names.title and text.startswith('"'):
        first, newline, rest = text.partition("\n")
        if newline and first.endswith('"'):
            title, text = first[1:-1], rest
    id_ = _field(where, row, names.id)
    if id_ == "":
        raise UserError(f"{where}: the id is empty; leave the field out to number the rows")
    return Document(where, number if id_ is None else id_, title, text, id_ is not None)


def _field(where: str, row: dict[str, Any], names: Sequence[str]) -> str | None:
    """The first of some fields that is not null, as text; None if there is none."""
    for name in names:
        value = row[name]
        if isinstance(value, str):  # in millions of rows: at once
            return value
        if value is not None:
            return text_field(where, row, name)
    return None


def _table_rows(
    path: Path, fields: Fields, at: Callable[[int], None], on_error: OnError
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("file:line", row) of a .tsv or .csv file."""
    csv.field_size_limit(_MAX_FIELD)
    with open_text(path, newline="") as (f, raw):
        delimiter = "\t" if kind_of(path) == ".tsv" else _delimiter(f.readline())
        f.seek(0)
        reader = csv.reader(f, delimiter=delimiter, strict=True)
        name = str(path)  # once: it takes as long as reading a row
        line, header, columns = 1, None, 0  # where the row begins
        try:
            for count, cells in enumerate(reader):
                where, line = f"{name}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = _header(where, cells, fields)
                    columns = len(header)
                    continue
                if not count % 64:  # it is for a progress bar
                    at(raw.tell())
                if len(cells) != columns:
                    separators = {"\t": "tabs", ",": "commas"}.get(delimiter, "semicolons")
                    on_error(UserError(
                        f"{where}: {len(cells)} columns, but the header has {len(header)}; "
                        f"quote fields that contain {separators}"
                    ))  # fmt: skip
                    continue
                yield where, dict(zip(header, cells))  # noqa: B905 (as many as there are columns)
        except csv.Error as e:
            hint = "is a quote not closed?"
            if "limit" not in str(e) and "end" not in str(e):
                hint = "put a field that begins with a quote into quotes, and double those in it"
            raise UserError(f"{path}:{line}: {e}; {hint}") from None


def is_passage_table(path: Path, others: Sequence[str]) -> bool:
    """Whether a .tsv or .csv file has a column of texts, and none of those that `others` names."""
    csv.field_size_limit(_MAX_FIELD)
    with open_text(path, newline="") as (f, _):
        first = f.readline()
        delimiter = "\t" if kind_of(path) == ".tsv" else _delimiter(first)
        cells = [c.strip() for c in next(csv.reader([first], delimiter=delimiter), [])]
    return bool(_present(cells, TEXT)) and not any(c in others for c in cells)


def _delimiter(header: str) -> str:
    return max("\t;,", key=header.count) if header.strip() else ","


def _header(where: str, cells: list[str], fields: Fields) -> list[str]:
    """Checks the first row: it must name the column of the text."""
    if "\0" in "".join(cells):
        raise UserError(f"{where}: holds a NUL byte; is it a text file, and in UTF-8?")
    if twice := [c for c in cells if c and cells.count(c) > 1]:
        raise UserError(f"{where}: the column {twice[0]!r} occurs more than once")
    for role in dict.fromkeys(("text", *fields)):
        wanted = (fields[role],) if role in fields else TEXT
        if not _present(cells, wanted):
            shown = ", ".join(c if len(c) <= 40 else c[:37] + "..." for c in cells[:6])
            usual = f"expected the columns id, text, title, or --fields={role}=NAME"
            remedy = f"correct {role}= in --fields" if role in fields else usual
            raise UserError(f"{where}: the header lacks {wanted[0]} (it has: {shown}); {remedy}")
    return cells
