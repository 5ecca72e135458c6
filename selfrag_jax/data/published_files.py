"""Reads files that others published: faulty rows are counted by kind instead of stopping the read.

A row is a line of a JSON-lines file, or an item of a JSON list or object. Lists and objects are
read piece by piece, since some published files are larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.files import open_text
from selfrag_jax.json_lists import begins_list, list_items

_FIRST_SHOWN = 5  # row numbers of each kind of fault in a message


class RowFault(Exception):
    """A row that cannot be used. Its text is the kind of fault, in the same words for all."""


@dataclass
class Faults:
    """The numbers of the rows that were left out, by kind of fault."""

    rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, number: int | str) -> None:
        self.rows.setdefault(kind, []).append(str(number))

    @property
    def total(self) -> int:
        return sum(map(len, self.rows.values()))

    def by_frequency(self) -> list[str]:
        """Returns one text per kind, such as "unclosed paragraph: 7 (rows 3, 19, ...)"."""
        by_count = sorted(self.rows.items(), key=lambda item: -len(item[1]))
        return [f"{kind}: {len(rows):,} ({_shown(rows)})" for kind, rows in by_count]


def _shown(rows: Sequence[str]) -> str:
    more = ", ..." if len(rows) > _FIRST_SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(rows[:_FIRST_SHOWN])}{more}"


def published_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
    """Yields (number, row) of a file, which may be compressed (.gz).

    The number is that of the line, or of the item in a list; both count from 1. A row that is not a
    JSON object comes as a RowFault. Raises UserError if the file is missing, cut off, or a list
    that is not valid JSON.
    """
    with open_text(path) as (f, _):
        if begins_list(f):
            for number, item in list_items(path, f):
                yield number, _checked(item)
            return
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, _checked_line(line)


def object_items(path: str | Path, name: str) -> Iterator[tuple[int, str, Any]]:
    """Yields (number, key, value) of the object or list that a JSON object holds under `name`.

    Raises UserError if there is none.
    """
    whole = _read_object(path)
    part = whole.get(name)
    if not isinstance(part, (dict, list)):
        present = ", ".join(sorted(whole)) or "nothing"
        raise UserError(f"{path}: missing field {name!r} (the file has: {present})")
    pairs = part.items() if isinstance(part, dict) else enumerate(part, 1)
    for number, (key, value) in enumerate(pairs, 1):
        yield number, str(key), value


def _read_object(path: str | Path) -> dict[str, Any]:
    try:
        with open_text(path) as (f, _):
            whole = json.load(f)
    except (json.JSONDecodeError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({e}); download it again") from None
    if not isinstance(whole, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(whole).__name__}")
    return whole


def _checked_line(line: str) -> dict[str, Any] | RowFault:
    try:
        return _checked(json.loads(line))
    except (json.JSONDecodeError, RecursionError):
        return RowFault("not JSON")


def _checked(row: Any) -> dict[str, Any] | RowFault:
    return row if isinstance(row, dict) else RowFault("not a JSON object")
