"""Packs training examples into batches of fixed shape.

Each document goes into the fullest row that still has room for it. Positions restart in each
document, and `doc_ids` keep attention inside it.

Losses come in two layouts. With `max_targets`, at most that many positions per batch have a loss.
They are gathered from all rows, and the vocabulary logits are computed there only: the choice for
small models on one device. Without it, every position has a target and a weight, and each device
computes those of its own rows.

A batch is a pure function of the seed and one integer, the index of its first example. That integer
is the packer's whole state, so a resumed run sees exactly the batches of an uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int8, Int32

from selfrag_jax.text import reflection
from selfrag_jax.text.tokenizer import BOS, Control, Part, Tokenizer

# For reports and loss weights: plain text, then the groups of reflection tokens.
LOSS_GROUPS = ("text", *reflection.GROUPS)
# Parts of a document, and the loss weight of predicting their tokens.
Span = tuple[Sequence[Part], float]


@dataclass(frozen=True)
class Example:
    """One document. `weight[i]` is the loss weight of predicting `tokens[i]`."""

    tokens: Int32[np.ndarray, " T"]
    weight: Float32[np.ndarray, " T"]  # 0 where nothing is learned
    group: Int8[np.ndarray, " T"]  # index into LOSS_GROUPS


class Source(Protocol):
    """Examples by index."""

    size: int  # examples per epoch; 0: unbounded, every index has its own example

    def example(self, i: int) -> Example: ...


@runtime_checkable
class OrderedSource(Source, Protocol):
    """A source that says itself in which order its examples come."""

    def row_at(self, i: int, seed: int) -> int:
        """Returns the row of the i-th example in training order, counted over all epochs."""
        ...


@dataclass(frozen=True)
class Batch:
    """What a training step reads: B rows of T tokens, and M targets or one per position.

    targets, weights and groups are [M] with max_targets, else [B, T].
    """

    tokens: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]  # restart in each document
    doc_ids: Int32[np.ndarray, "B T"]  # 1, 2, ... within a row; 0 is padding
    # Flat index b * T + t of each position whose next token is learned; None without max_targets.
    loss_index: Int32[np.ndarray, " M"] | None
    targets: Int32[np.ndarray, ...]  # the next tokens
    weights: Float32[np.ndarray, ...]  # 0 for unused entries
    groups: Int8[np.ndarray, ...]  # index into LOSS_GROUPS
    truncated: int  # number of examples that did not fit whole


def build_example(
    tokenizer: Tokenizer,
    spans: Sequence[Span],
    group_weights: dict[str, float],
) -> Example:
    """Returns the tokenized spans, after a beginning-of-text token.

    spans: weight 0 is for context, such as a passage.
    group_weights: factors on the weights of reflection tokens, by group.
    """
    group_of = {t: g for g, tokens in reflection.GROUPS.items() for t in tokens}
    encoded = tokenizer.encode_spans([[Control(BOS)], *(parts for parts, _ in spans)])
    tokens: list[int] = []
    weight: list[float] = []
    group: list[int] = []
    for pieces, w in zip(encoded, (0.0, *(w for _, w in spans)), strict=True):
        for ids, control in pieces:
            name = None if control is None else group_of.get(control)
            tokens += ids
            weight += [w * (group_weights[name] if name else 1.0)] * len(ids)
            group += [LOSS_GROUPS.index(name) if name else 0] * len(ids)
    return Example(
        np.array(tokens, np.int32), np.array(weight, np.float32), np.array(group, np.int8)
    )


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """Returns the indices of `size` examples in the order of an epoch."""
    order = list(range(size))
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return order


class Packer:
    """Packs examples of a source into batches of `rows` x `length` tokens.

    state: the index of the next example, counted over all epochs. It is the only state: a packer
    that starts from it continues with the same batches.
    packed: False puts one example in each row.
    end: the last batch ends before this example, with empty rows; None: there is no end.
    """

    def __init__(
        self,
        source: Source,
        rows: int,
        length: int,
        max_targets: int | None,
        seed: int,
        state: int = 0,
        packed: bool = True,
        end: int | None = None,
    ):
        self.source, self.rows, self.length, self.max_targets = source, rows, length, max_targets
        self.seed, self.state, self.packed, self.end = seed, state, packed, end
        self._order = lru_cache(maxsize=2)(self._epoch_order)
        self._ordered = source if isinstance(source, OrderedSource) else None

    def _epoch_order(self, epoch: int) -> list[int]:
        return epoch_order(self.source.size, self.seed, epoch)

    def source_rows(self, first: int, end: int) -> list[int]:
        """Returns the source's indices of the examples `first` to `end` - 1 in training order."""
        return [self._source_row(i) for i in range(first, end)]

    def _source_row(self, i: int) -> int:
        if self._ordered is not None:
            return self._ordered.row_at(i, self.seed)
        if not self.source.size:
            return i
        epoch, i_in_epoch = divmod(i, self.source.size)
        return self._order(epoch)[i_in_epoch]

    def next(self) -> Batch:
        """Returns the next batch and advances `state` by the number of examples in it.

        Raises StopIteration at `end`.
        """
        if self.state == self.end:
            raise StopIteration
        rows: list[list[Example]] = [[] for _ in range(self.rows)]
        used = [0] * self.rows  # tokens in each row
        num_examples = num_targets = truncated = 0
        limit = self.rows * self.length if self.max_targets is None else self.max_targets
        while self.state + num_examples != self.end:
            whole = self.source.example(self._source_row(self.state + num_examples))
            e = _truncate(whole, self.length)
            learned = int((e.weight[1:] > 0).sum())
            fitting = [
                r
                for r in range(self.rows)
                if used[r] + len(e.tokens) <= self.length and (self.packed or not rows[r])
            ]
            if num_examples and (not fitting or num_targets + learned > limit):
                break
            fullest = max(fitting, key=lambda r: used[r])
            rows[fullest].append(e)
            used[fullest] += len(e.tokens)
            num_examples += 1
            num_targets += min(learned, limit)
            truncated += e is not whole or learned > limit
        self.state += num_examples
        return self._assemble(rows, truncated)

    def _assemble(self, rows: list[list[Example]], truncated: int) -> Batch:
        shape = self.rows, self.length
        tokens, positions, doc_ids = (np.zeros(shape, np.int32) for _ in range(3))
        targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        groups = np.zeros(shape, np.int8)
        for b, examples in enumerate(rows):
            start = 0
            for doc_id, e in enumerate(examples, 1):
                end = start + len(e.tokens)
                tokens[b, start:end] = e.tokens
                positions[b, start:end] = np.arange(len(e.tokens))
                doc_ids[b, start:end] = doc_id
                targets[b, start : end - 1] = e.tokens[1:]
                weights[b, start : end - 1] = e.weight[1:]
                groups[b, start : end - 1] = e.group[1:]
                start = end
        loss_index = None
        if self.max_targets is not None:
            index = np.flatnonzero(weights)[: self.max_targets].astype(np.int32)
            loss_index, targets, weights, groups = (
                _pad(x, self.max_targets)
                for x in (index, *(y.ravel()[index] for y in (targets, weights, groups)))
            )
        return Batch(tokens, positions, doc_ids, loss_index, targets, weights, groups, truncated)


def _truncate(e: Example, length: int) -> Example:
    """Cuts an example to at most `length` tokens.

    It loses its end, or its middle if only the end is learned (a critic's verdict).
    """
    n = len(e.tokens)
    if n <= length:
        return e
    kept = np.arange(length)
    if not (e.weight[1:length] > 0).any():
        kept[length // 2 :] += n - length
    return Example(e.tokens[kept], e.weight[kept], e.group[kept])


def _pad(a: np.ndarray, n: int) -> np.ndarray:
    return np.concatenate([a, np.zeros(n - len(a), a.dtype)])
