"""Passages on disk: DPR's tab-separated format (header `id text title`, quoted) or JSON lines.

A corpus is read into memory as records. Ids are kept as the file has them and must be unique.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from selfrag_jax.errors import UserError
from selfrag_jax.files import atomic_write
from selfrag_jax.records import Passage, passage_from, read_rows

COLUMNS = ("id", "text", "title")


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


def read_corpus(path: str | Path) -> list[Passage]:
    """Returns all passages of a .tsv, .jsonl or .json file.

    Raises UserError naming file and line for a missing column or field, an empty text, a duplicate
    id, and for an empty corpus.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected passages as .tsv (columns id, text, title) or .jsonl"
        )
    rows = _read_json(path) if path.suffix in (".jsonl", ".json") else _read_tsv(path)
    passages: list[Passage] = []
    seen: dict[str, str] = {}
    for where, p in rows:
        if not p.text.strip():
            raise UserError(f"{where}: the passage has no text")
        if p.id in seen:
            raise UserError(f"{where}: id {p.id!r} was already used at {seen[p.id]}")
        seen[p.id] = where
        passages.append(p)
    if not passages:
        raise UserError(f"{path}: holds no passages")
    return passages


def _read_tsv(path: Path) -> Iterable[tuple[str, Passage]]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, delimiter="\t", strict=True)
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
            for row in reader:
                if not row:
                    continue
                where = f"{path}:{reader.line_num}"
                if len(row) != len(header):
                    raise UserError(
                        f"{where}: {len(row)} columns, but the header has {len(header)}; "
                        "quote fields that contain tabs"
                    )
                fields = dict(zip(header, row, strict=True))
                yield where, Passage(fields["id"], fields.get("title", ""), fields["text"])
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: not UTF-8 ({e.reason} at byte {e.start})") from None
        except csv.Error as e:
            raise UserError(f"{path}:{reader.line_num}: {e}") from None


def _read_json(path: Path) -> Iterable[tuple[str, Passage]]:
    for i, (where, row) in enumerate(read_rows(path)):
        yield where, passage_from(where, row, i)
