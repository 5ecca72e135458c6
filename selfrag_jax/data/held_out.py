"""Rows that are held out of training, to measure the model on: a file of its own, or a share.

A share is chosen by a hash of the seed and of what a row asks (its instruction and input), so rows
about one instruction are all held out or all trained on, and the choice does not depend on the
order of the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from selfrag_jax.data.batches import Example, Source, epoch_order
from selfrag_jax.errors import UserError


class RowSource(Source, Protocol):
    """A source whose examples are made of rows."""

    rows: Sequence[Any]


class Subset:
    """Some rows of a source, as a source.

    An example keeps the index that it has in the whole source. shuffled: in another order each
    epoch; False: always in that of the source.
    """

    def __init__(self, source: Source, rows: Sequence[int] | np.ndarray, shuffled: bool = True):
        self.source, self.rows, self.size = source, np.asarray(rows, np.int64), len(rows)
        self._shuffled = shuffled
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def example(self, i: int) -> Example:
        return self.source.example(i)

    def row_at(self, i: int, seed: int) -> int:
        """Returns the row of the i-th example in training order, counted over all epochs."""
        epoch, i_in_epoch = divmod(i, self.size)
        return int(self.rows[self._order(epoch, seed)[i_in_epoch]])

    def _epoch_order(self, epoch: int, seed: int) -> Sequence[int]:
        return epoch_order(self.size, seed, epoch) if self._shuffled else range(self.size)


def hold_out(source: RowSource, share: float, seed: int) -> tuple[Subset, Subset]:
    """Returns the rows to train on, and about `share` of them, which are held out.

    Raises UserError if either would be empty.
    """
    is_held = np.fromiter((_fraction(row, seed) < share for row in source.rows), bool, source.size)
    if is_held.all() or not is_held.any():
        what = "all" if is_held.all() else "none"
        raise UserError(
            f"--held_out={share}: {what} of the {source.size} rows would be held out; "
            "give another share, or a file"
        )
    kept, held = np.flatnonzero(~is_held), np.flatnonzero(is_held)
    return Subset(source, kept), Subset(source, held, shuffled=False)


def all_rows(source: RowSource) -> Subset:
    """Returns the rows of a source in their order, each once, as held-out rows are read."""
    return Subset(source, range(source.size), shuffled=False)


def questions_in_common(source: RowSource, other: RowSource) -> int:
    """Returns how many rows of `other` ask what a row of `source` asks."""
    asked = {_asks(row) for row in source.rows}
    return sum(_asks(row) in asked for row in other.rows)


def _asks(row: Any) -> str:
    return f"{row.instruction}\n{getattr(row, 'input', None) or ''}"


def _fraction(row: Any, seed: int) -> float:
    digest = hashlib.sha256(f"held-out-{seed}-{_asks(row)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
