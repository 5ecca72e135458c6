"""Training examples packed into batches of fixed shape.

Each document goes into the fullest row that still has room for it; positions restart in each document and `doc_ids` keep attention inside it.
With `max_targets`, the losses of a batch sit at no more than so many positions, gathered from all rows, so that the
vocabulary logits are computed there only: the choice for small models on one device. Without, every position has a
target and a weight, and each device computes those of its own rows.

A batch is a pure function of its seed and of one number, the index of the next example: that number is the iterator's whole
state, and a resumed run sees exactly the batches of an uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from selfrag_jax.text import reflection
from selfrag_jax.text.tokenizer import BOS, Control, Part, Tokenizer

# Loss groups, for reports and weights: plain text, then the reflection-token groups.
LOSS_GROUPS = ("text", *reflection.GROUPS)


@dataclass(frozen=True)
class Example:
    """One document. All arrays have its length; `weight[i]` is the loss weight of predicting `tokens[i]`."""

    tokens: np.ndarray  # int32
    weight: np.ndarray  # float32, 0 where nothing is learned
    group: np.ndarray  # int8, index into LOSS_GROUPS


class Source(Protocol):
    """Examples by index. `len` is the size of an epoch; a generated source may be unbounded (size 0)."""

    size: int

    def example(self, i: int) -> Example: ...


@dataclass(frozen=True)
class Batch:
    tokens: np.ndarray  # [B, T] int32
    positions: np.ndarray  # [B, T] int32, restarting in each document
    doc_ids: np.ndarray  # [B, T] int32, 1.. within a row; 0 is padding
    loss_index: (
        np.ndarray | None
    )  # [M] int32, flat index b * T + t of a position whose next token is learned; or none
    targets: np.ndarray  # [M] int32, or [B, T]
    weights: np.ndarray  # [M] float32, 0 for unused entries, or [B, T]
    groups: np.ndarray  # [M] int8, or [B, T]
    truncated: int  # examples of which something was left out


def build_example(
    tokenizer: Tokenizer,
    segments: Sequence[tuple[Sequence[Part], float]],
    group_weights: dict[str, float],
) -> Example:
    """Tokenises `segments`, each a list of parts with a loss weight (0: context only).

    Reflection tokens' weights are multiplied by their group's entry in `group_weights`. A beginning-of-text token is
    put in front. Passages carry weight 0 each on its own, never what stands between two of them.
    """
    group_of = {t: g for g, tokens in reflection.GROUPS.items() for t in tokens}
    encoded = tokenizer.encode_segments([[Control(BOS)], *(parts for parts, _ in segments)])
    tokens, weight, group = [], [], []
    for pieces, w in zip(encoded, (0.0, *(w for _, w in segments)), strict=True):
        for ids, control in pieces:
            name = group_of.get(control)
            tokens += ids
            weight += [w * (group_weights[name] if name else 1.0)] * len(ids)
            group += [LOSS_GROUPS.index(name) if name else 0] * len(ids)
    return Example(
        np.array(tokens, np.int32), np.array(weight, np.float32), np.array(group, np.int8)
    )


class Packer:
    """Fills batches of `rows` x `length` tokens from a source, starting at example `state`."""

    def __init__(
        self,
        source: Source,
        rows: int,
        length: int,
        max_targets: int | None,
        seed: int,
        state: int = 0,
        packed: bool = True,
    ):
        self.source, self.rows, self.length, self.max_targets = source, rows, length, max_targets
        self.seed, self.state, self.packed = seed, state, packed
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> list[int]:
        order = list(range(self.source.size))
        random.Random(f"order-{self.seed}-{epoch}").shuffle(order)
        return order

    def rows_of(self, first: int, end: int) -> list[int]:
        """The source's own numbers of the examples from `first` up to `end` in training order."""
        return [self._row(i) for i in range(first, end)]

    def _row(self, i: int) -> int:
        if not self.source.size:
            return i
        epoch, at = divmod(i, self.source.size)
        return self._order(epoch)[at]

    def next(self) -> Batch:
        """The next batch; `state` moves on by the number of examples in it."""
        rows: list[list[Example]] = [[] for _ in range(self.rows)]
        used, targets, taken, truncated = [0] * self.rows, 0, 0, 0
        most = self.rows * self.length if self.max_targets is None else self.max_targets
        while True:
            e = self.source.example(self._row(self.state + taken))
            whole, e = e, _cut(e, self.length)
            learned = int((e.weight[1:] > 0).sum())
            fits = [
                r
                for r in range(self.rows)
                if used[r] + len(e.tokens) <= self.length and (self.packed or not rows[r])
            ]
            if taken and (not fits or targets + learned > most):
                break
            row = max(fits, key=lambda r: used[r])  # the fullest row that still has room
            rows[row].append(e)
            truncated += e is not whole or learned > most
            used[row] += len(e.tokens)
            targets += min(learned, most)
            taken += 1
        self.state += taken
        return self._assemble(rows, truncated)

    def _assemble(self, rows: list[list[Example]], truncated: int) -> Batch:
        B, T = self.rows, self.length
        tokens, positions, doc_ids = (np.zeros((B, T), np.int32) for _ in range(3))
        targets, weights, groups = (
            np.zeros((B, T), np.int32),
            np.zeros((B, T), np.float32),
            np.zeros((B, T), np.int8),
        )
        for b, examples in enumerate(rows):
            at = 0
            for d, e in enumerate(examples, 1):
                n = len(e.tokens)
                tokens[b, at : at + n], positions[b, at : at + n], doc_ids[b, at : at + n] = (
                    e.tokens,
                    np.arange(n),
                    d,
                )
                next_tokens = slice(at, at + n - 1)
                targets[b, next_tokens], weights[b, next_tokens] = e.tokens[1:], e.weight[1:]
                groups[b, next_tokens] = e.group[1:]
                at += n
        if self.max_targets is None:
            return Batch(tokens, positions, doc_ids, None, targets, weights, groups, truncated)
        index = np.flatnonzero(weights)[: self.max_targets].astype(np.int32)
        learned = (_padded(x.ravel()[index], self.max_targets) for x in (targets, weights, groups))
        return Batch(
            tokens, positions, doc_ids, _padded(index, self.max_targets), *learned, truncated
        )


def _cut(e: Example, length: int) -> Example:
    """At most `length` tokens: without its end or, where only that is learned (a critic's verdict), without its middle."""
    n = len(e.tokens)
    if n <= length:
        return e
    kept = np.arange(length)
    if not (e.weight[1:length] > 0).any():
        kept[length // 2 :] += n - length
    return Example(e.tokens[kept], e.weight[kept], e.group[kept])


def _padded(a: np.ndarray, n: int) -> np.ndarray:
    return np.concatenate([a, np.zeros(n - len(a), a.dtype)])
