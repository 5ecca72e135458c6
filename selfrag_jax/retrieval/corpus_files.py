"""The files of a corpus: which there are, and the documents in them.

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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from selfrag_jax.errors import OnError, UserError, raise_error
from selfrag_jax.files import open_text
from selfrag_jax.records import PASSAGE_ID_FIELDS, PASSAGE_TEXT_FIELDS, read_rows, text_field
from selfrag_jax.text.splitting import first_heading

ID = (*PASSAGE_ID_FIELDS, "url")
TEXT = (*PASSAGE_TEXT_FIELDS, "body", "passage", "passage_text", "document")
TITLE = ("title", "heading", "headline")
TABLES, ROWS, DOCUMENTS = (".tsv", ".csv"), (".jsonl", ".ndjson", ".json"), (".txt", ".md", ".rst")
_KINDS = f"{', '.join((*TABLES, *ROWS, *DOCUMENTS))}, each also as .gz, or a folder of them"
# Kinds of file that other programs turn into text.
_PANDOC = (".html", ".htm", ".docx", ".odt", ".epub")
_CURES = {
    ".pdf": "pdftotext FILE.pdf",
    **{suffix: f"pandoc -t plain FILE{suffix} -o FILE.txt" for suffix in _PANDOC},
    ".doc": "soffice --convert-to txt FILE.doc",
    ".xlsx": "save it as .csv",
    ".parquet": "pandas.read_parquet(FILE).to_json('corpus.jsonl', orient='records', lines=True)",
    ".zip": "unzip FILE.zip, and give the folder",
}
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


def kind_of(path: Path) -> str:
    """The suffix of a file, without .gz: ".tsv"."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


# ---- which files there are -----------------------------------------------------------------------
def corpus_files(path: Path) -> tuple[list[Path], str]:
    """Returns the files of a corpus, in a fixed order, and a line about files that are left out.

    Raises UserError if there is no such file, if it is of a kind that is not read or may not be
    read, and if a folder has none.
    """
    files, left_out = _chosen(path)
    if denied := next((f for f in files if not os.access(f, os.R_OK)), None):
        raise UserError(f"{denied}: you may not read it (see `ls -l`); change that, or take it out")
    return files, left_out


def _chosen(path: Path) -> tuple[list[Path], str]:
    known = (*TABLES, *ROWS, *DOCUMENTS)
    if path.is_file():
        if kind_of(path) not in known:
            raise UserError(f"{path}: {_refusal(kind_of(path))}")
        return [path], ""
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder of passages: {_KINDS}")
    found = list(_walk(path))
    # A folder's .json files are settings more often than passages.
    files = [p for p in found if kind_of(p) in known and kind_of(p) != ".json"]
    is_read = set(files)
    others = Counter(kind_of(p) or "without a suffix" for p in found if p not in is_read)
    counted = ", ".join(f"{n:,} {kind}" for kind, n in others.most_common(5))
    cures = "".join(f"; {kind}: {_CURES[kind]}" for kind in others if kind in _CURES)
    if not files:
        what = f"; it has {counted}{cures}" if others else ""
        raise UserError(f"{path}: the folder has no files of passages ({_KINDS}){what}")
    return files, f"{path}: files left out: {counted}{cures}" if others else ""


def _refusal(kind: str) -> str:
    if kind in _CURES:
        return f"{kind} files are not read; turn it into text first: {_CURES[kind]}"
    return f"is of no kind that is read; expected {_KINDS}"


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder in sorted order, without hidden ones.

    Links are followed, but not to a folder that was read already or that this one is in.
    """

    def failed(e: OSError) -> None:
        raise UserError(f"{e.filename}: may not be read ({e.strerror}); see `ls -l`")

    root = Path(os.path.realpath(folder))
    seen: set[str] = set(map(str, root.parents))
    for above, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        if (real := os.path.realpath(above)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            path = Path(above, name)
            if not name.startswith(".") and path.is_file():
                yield path


# ---- what is in them -----------------------------------------------------------------------------
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
    for number, (where, row) in enumerate(rows):
        try:
            document = _from_row(where, row, f"{start}{number}", _names(tuple(row), said))
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
            for cells in reader:
                where, line = f"{name}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = _header(where, cells, fields)
                    columns = len(header)
                    continue
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
            raise UserError(
                f"{where}: the header lacks {wanted[0]} (it has: {shown}); expected the columns "
                f"id, text, title, or --fields={role}=NAME"
            )
    return cells
