"""What a published set is, and the fields that several layouts share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrag_jax.data.published_files import RowFault, published_rows
from selfrag_jax.errors import UserError
from selfrag_jax.records import ROW_ID_FIELDS, Instruction

Rows = Iterator[tuple[int, Any]]  # number in the file, and the row or a RowFault


@dataclass(frozen=True)
class PublishedSet:
    """A set as its authors publish it.

    convert: makes an instruction of a row, or raises RowFault with the reason for leaving it out.
    rows: yields the rows of a file; some files hold several in what JSON calls a row.
    """

    name: str
    files: tuple[str, ...]  # names or patterns, perhaps with .gz; the first that is there is read
    published_at: str
    convert: Callable[[dict[str, Any]], Instruction]
    rows: Callable[[Path], Rows] = published_rows
    own_ids: bool = False  # ids and dataset_name stay as they are, and may repeat

    def find_files(self, manual_dir: str | Path) -> list[Path]:
        """Returns the set's files in a folder, or in its subfolder of the set's name.

        A file is returned as it is. Raises UserError naming the expected files.
        """
        given = Path(manual_dir)
        if given.is_file():
            return [given]
        for folder in (given / self.name, given):
            for pattern in (name + ending for name in self.files for ending in ("", ".gz")):
                if found := sorted(p for p in folder.glob(pattern) if p.is_file()):
                    return found
        what = "has no" if given.is_dir() else "no such folder; expected it to hold"
        raise UserError(
            f"--manual_dir={given}: {what} {' or '.join(self.files)} for {self.name}; "
            f"download it from {self.published_at}"
        )


def text(row: Any, *names: str) -> str:
    """Returns the first of the fields that a row has, without space around. Raises RowFault."""
    for name in names:
        value = row.get(name) if isinstance(row, dict) else None
        if isinstance(value, str):
            return value.strip()
        if value is not None:
            raise RowFault(f"field {name!r} is not text")
    raise RowFault(f"missing field {' or '.join(map(repr, names))}")


def filled_text(row: Any, *names: str) -> str:
    """As `text`, but an empty question is a fault."""
    found = text(row, *names)
    if not found:
        raise RowFault("empty question")
    return found


def optional_text(row: dict[str, Any], *names: str) -> str:
    return text(row, *names) if any(row.get(name) is not None for name in names) else ""


def objects(row: Any, name: str) -> list[dict[str, Any]]:
    """Returns a field that is a list of objects. Raises RowFault."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowFault(f"missing field {name!r}" if value is None else f"malformed {name!r}")
    return value


def row_id(row: dict[str, Any]) -> str:
    """Returns the id that a row has, else ""."""
    found = (row[name] for name in ROW_ID_FIELDS if isinstance(row.get(name), (str, int)))
    return str(next(found, ""))
