"""Reads JSON files that are one list item by item; a file may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from selfrag_jax.errors import UserError

_PIECE = 1 << 20  # characters read at a time
_SPACE = " \t\r\n"
# An error this close to the end of what was read may come from a value that is cut there.
_LONGEST_CUT = 16  # characters; of "-Infinity" or an escape

_CUT_OFF = "the list is cut off; copy or download it again"


def begins_list(f: TextIO) -> bool:
    """Whether a file holds a JSON list. Goes back to its beginning."""
    head = f.read(1)
    while head.isspace():
        head = f.read(1)
    f.seek(0)
    return head == "["


def list_items(path: str | Path, f: TextIO) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of the items of a JSON list, which is never held as a whole.

    Numbers count from 1. Raises UserError, which calls the file `path`, if the list is not valid
    JSON or is cut off.
    """
    items = _Items(path, f)
    number = 0
    items.pass_over("[")
    while items.next_sign() != "]":
        if number:
            items.pass_over(",")
            items.next_sign()
        number += 1
        yield number, items.value()
    items.pass_over("]")
    items.require_end()


class _Items:
    """The text of a list, of which only a piece is in memory."""

    def __init__(self, path: str | Path, f: TextIO):
        self.path, self.f = path, f
        self.decoder = json.JSONDecoder()
        self.buffer, self.at = "", 0
        self.ended = False  # the file
        self.line, self.column = 1, 1  # of the buffer's first character, in the file

    def next_sign(self) -> str:
        """Returns the next character that is not white space, and stays before it."""
        while not self._skip_space():
            if self.ended:
                raise self._damaged(self.at, _CUT_OFF)
            self._fill()
        return self.buffer[self.at]

    def pass_over(self, sign: str) -> None:
        if self.next_sign() != sign:
            raise self._damaged(self.at, _invalid(f"expected {sign!r}"))
        self.at += 1

    def require_end(self) -> None:
        """Raises UserError if anything but white space is left."""
        while not self._skip_space():
            if self.ended:
                return
            self._fill()
        raise self._damaged(self.at, _invalid("text after the end of the list"))

    def value(self) -> Any:
        """Returns the value that begins here, and goes behind it."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
                # A number may go on in the next piece; other values end with their own last sign.
                if self.ended or not isinstance(value, (int, float)) or self._ends_at(end):
                    self.at = end
                    return value
            except RecursionError:
                raise self._damaged(self.at, "nested too deeply to be a row of data") from None
            except json.JSONDecodeError as e:
                unterminated = e.msg.startswith("Unterminated")
                if self.ended:
                    is_cut = unterminated or e.pos == len(self.buffer)
                    raise self._damaged(e.pos, _CUT_OFF if is_cut else _invalid(e.msg)) from None
                if not unterminated and e.pos < len(self.buffer) - _LONGEST_CUT:
                    raise self._damaged(e.pos, _invalid(e.msg)) from None
            self._fill()

    def _skip_space(self) -> bool:
        """Goes to the next character that is not white space; False if the buffer has none."""
        while self.at < len(self.buffer) and self.buffer[self.at] in _SPACE:
            self.at += 1
        return self.at < len(self.buffer)

    def _ends_at(self, end: int) -> bool:
        return end < len(self.buffer) and self.buffer[end] in f"{_SPACE},]"

    def _fill(self) -> None:
        """Reads on; as much again as there is, so that a large item is decoded few times."""
        piece = self.f.read(max(_PIECE, len(self.buffer) - self.at))
        self.line, self.column = self._place(self.at)
        self.buffer, self.at, self.ended = self.buffer[self.at :] + piece, 0, not piece

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column in the file of a place in the buffer."""
        lines = self.buffer.count("\n", 0, at)
        if not lines:
            return self.line, self.column + at
        return self.line + lines, at - self.buffer.rfind("\n", 0, at)

    def _damaged(self, at: int, what: str) -> UserError:
        line, column = self._place(at)
        return UserError(f"{self.path}:{line}: {what} (column {column})")


def _invalid(why: str) -> str:
    return f"not valid JSON: {why}"
