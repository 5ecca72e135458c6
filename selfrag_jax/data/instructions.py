"""Reads instructions with outputs: JSON lines, chats, and folders made by `selfrag prepare`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selfrag_jax.data import prepared
from selfrag_jax.data.chats import flatten_chat, is_chat
from selfrag_jax.errors import UserError
from selfrag_jax.records import Instruction, instruction_from, read_rows
from selfrag_jax.text import reflection

RowReader = Callable[[str | Path], Iterator[tuple[str, dict[str, Any]]]]


def read_instructions(path: str | Path) -> list[Instruction]:
    """Returns the instructions of a file of JSON lines, or of a folder made by `selfrag prepare`.

    Raises UserError with file and line if a row lacks its instruction or output, and as
    `checked_instructions` does.
    """
    found: list[Instruction] = []
    for where, made in checked_instructions(path):
        require_text(where, made)
        found.append(made)
    return found


def require_text(where: str, row: Instruction) -> None:
    """Raises UserError if a row's instruction or output is empty."""
    if not row.full_instruction:
        raise UserError(f"{where}: the instruction is empty")
    if not row.output.strip():
        raise UserError(f"{where}: the output is empty; add it, or remove the row")


def checked_instructions(
    path: str | Path, announce: bool = True
) -> Iterator[tuple[str, Instruction]]:
    """Yields ("file:line", instruction) of each row.

    announce: says on stderr how many chats there were. Raises UserError with file and line if a row
    is malformed or has the id of an earlier row, and if there are no rows.
    """
    first_with: dict[str, str] = {}
    for where, row in instruction_rows(path, announce):
        made = instruction_of(where, row)
        first = first_with.setdefault(made.id, where)
        if first != where:
            raise UserError(
                f"{where}: id {made.id!r} is also the id of {first}; "
                "give each row an id of its own, or remove the field"
            )
        yield where, made
    if not first_with:
        raise UserError(f"{path}: holds no rows")


def require_passages(path: str | Path, some: bool) -> None:
    """Raises UserError unless some rows of `path` have passages."""
    if not some:
        raise UserError(
            f"{path}: no row has passages (ctxs); run `selfrag retrieve` on it first, or give "
            "`selfrag label` an --index"
        )


def instruction_of(where: str, row: dict[str, Any]) -> Instruction:
    """Returns a row as an instruction. Raises UserError if it is a row of training data."""
    made = instruction_from(where, row)
    if row.get("task") in reflection.GROUPS:
        raise UserError(f"{where}: field 'task': this is critic data; expected instructions")
    output = made.output
    if output.startswith(reflection.RETRIEVE) and output.endswith(reflection.ISUSE):
        raise UserError(f"{where}: field 'output' is labelled already; expected plain outputs")
    return made


def instruction_rows(
    path: str | Path, announce: bool = True, read: RowReader = read_rows
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", row) as `read` does; reads folders too, and flattens chats.

    announce: says on stderr how many chats there were.
    """
    chats = 0
    is_folder = Path(path).is_dir()
    for where, row in prepared.read_prepared(path) if is_folder else read(path):
        if is_chat(row):
            row, chats = flatten_chat(where, row), chats + 1
        yield where, row
    if chats and announce:
        print_chats(path, chats)


def print_chats(path: str | Path, chats: int) -> None:
    """Says on stderr how many rows were chats."""
    print(
        f"{path}: {chats:,} chats; each gave its last user and assistant turn as instruction and "
        "output",
        file=sys.stderr,
    )
