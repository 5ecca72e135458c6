"""Corpus files: streamed, in any of the published layouts, never read into memory.

- TSV with a header: `id text title`, quoted as Python's csv module does it (DPR's psgs_w100.tsv).
- JSON lines: an id (any of records.PASSAGE_ID_FIELDS), `text` or `contents`, and `title`, as BEIR,
  Pyserini, FlashRAG and Tevatron have them.

Both may be compressed (.gz). Ids are kept as the file has them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from selfrag_jax.errors import OnError, UserError, raise_error
from selfrag_jax.files import atomic_write, open_text
from selfrag_jax.records import (
    PASSAGE_ID_FIELDS,
    PASSAGE_TEXT_FIELDS,
    Passage,
    read_rows,
    text_field,
)

COLUMNS = ("id", "text", "title")
# A longer field is taken for an unclosed quote, which would swallow the rest of the file.
_MAX_FIELD = 1 << 22  # characters


def write_tsv(path: str | Path, passages: Iterable[Passage]) -> int:
    """Writes passages in DPR's format; returns their number."""
    n = 0
    with atomic_write(path) as f:
        writer = csv.writer(f, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(COLUMNS)
        for p in passages:
            writer.writerow((p.id, p.text, p.title))
            n += 1
    return n


class Corpus:
    """A corpus file as a stream of passages.

    Passages with neither title nor text are left out and counted in `num_empty`.
    """

    def __init__(self, path: str | Path, on_error: OnError = raise_error):
        """on_error: takes the UserError of a row. Raises UserError if there is no such file."""
        self.path, self.on_error = Path(path), on_error
        if not self.path.is_file():
            what = "is a folder; expected one file" if self.path.is_dir() else "no such file"
            raise UserError(
                f"{path}: {what} of passages: .tsv (columns id, text, title) or .jsonl, or .gz"
            )
        self.num_bytes = self.path.stat().st_size
        self.bytes_read = 0  # so far, on disk
        self.num_empty = 0

    def __iter__(self) -> Iterator[tuple[str, Passage]]:
        """Yields ("file:line", passage).

        A JSON row without an id gets its row number. Raises UserError naming file and line for a
        missing column or field and for an empty id.
        """
        self.bytes_read = self.num_empty = 0
        name = self.path.name.removesuffix(".gz")
        is_json = name.endswith((".jsonl", ".json", ".ndjson"))
        for where, passage in self._read_json() if is_json else self._read_tsv():
            if passage.text.strip() or passage.title.strip():
                yield where, passage
            else:
                self.num_empty += 1
        self.bytes_read = self.num_bytes

    def _read_tsv(self) -> Iterator[tuple[str, Passage]]:
        path = self.path
        csv.field_size_limit(_MAX_FIELD)
        with open_text(path, newline="") as (f, raw):
            reader = csv.reader(f, delimiter="\t", strict=True)
            line = 1  # where the row begins
            try:
                header = next(reader, None)
                if header is None:
                    return
                missing = [c for c in ("id", "text") if c not in header]
                if missing:
                    raise UserError(
                        f"{path}:1: the header lacks {' and '.join(missing)}; "
                        "expected the columns id, text, title"
                    )
                id_column, text_column = header.index("id"), header.index("text")
                title_column = header.index("title") if "title" in header else None
                line = reader.line_num + 1
                for row in reader:
                    if row:
                        where = f"{path}:{line}"
                        self.bytes_read = raw.tell()
                        if len(row) != len(header):
                            self.on_error(UserError(
                                f"{where}: {len(row)} columns, but the header has {len(header)}; "
                                "quote fields that contain tabs"
                            ))  # fmt: skip
                        elif not row[id_column]:
                            self.on_error(UserError(f"{where}: the id is empty"))
                        else:
                            title = "" if title_column is None else row[title_column]
                            yield where, Passage(row[id_column], title, row[text_column])
                    line = reader.line_num + 1
            except UnicodeDecodeError as e:
                raise UserError(f"{path}: not UTF-8 after line {line - 1} ({e.reason})") from None
            except csv.Error as e:
                hint = "; is a quote not closed?" if "limit" in str(e) or "end" in str(e) else ""
                raise UserError(f"{path}:{line}: {e}{hint}") from None

    def _read_json(self) -> Iterator[tuple[str, Passage]]:
        def at(position: int) -> None:
            self.bytes_read = position

        for number, (where, row) in enumerate(read_rows(self.path, at, self.on_error)):
            try:
                passage = _passage(where, row, number)
            except UserError as e:
                self.on_error(e)
            else:
                yield where, passage


def _passage(where: str, row: dict[str, Any], number: int) -> Passage:
    """A passage from a JSON row. `number` is the id of a row without one."""
    if not any(name in row for name in PASSAGE_TEXT_FIELDS):
        text_field(where, row, PASSAGE_TEXT_FIELDS)  # raises: a corpus of titles alone is a mistake
    text = text_field(where, row, PASSAGE_TEXT_FIELDS, "")
    title = text_field(where, row, "title", "")
    first, newline, rest = text.partition("\n")
    # FlashRAG and Pyserini put the title into `contents`, as a quoted first line.
    if "title" not in row and "text" not in row and newline and first[:1] == first[-1:] == '"':
        title, text = first[1:-1], rest
    id_ = text_field(where, row, PASSAGE_ID_FIELDS, str(number))
    if not id_:
        raise UserError(f"{where}: the id is empty")
    return Passage(id_, title, text)
