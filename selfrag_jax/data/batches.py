"""Training examples packed into batches of fixed shape.

Documents are packed first-fit into rows; positions restart in each document and `doc_ids` keep attention inside it.
The losses of a batch sit at no more than `max_targets` positions, so that the vocabulary logits are computed there
only. A batch is a pure function of its seed and of one number, the index of the next example: that number is the
iterator's whole state, and a resumed run sees exactly the batches of an uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from selfrag_jax import reflection
from selfrag_jax.tokenizer import Control, Part, Tokenizer

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
    loss_index: np.ndarray  # [M] int32, flat index b * T + t of a position whose next token is learned
    targets: np.ndarray  # [M] int32
    weights: np.ndarray  # [M] float32, 0 for unused entries
    groups: np.ndarray  # [M] int8
    examples: int
    truncated: int


def build_example(
    tokenizer: Tokenizer, segments: Sequence[tuple[Sequence[Part], float]], group_weights: dict[str, float]
) -> Example:
    """Tokenises `segments`, each a list of parts with a loss weight (0: context only).

    Reflection tokens' weights are multiplied by their group's entry in `group_weights`. A beginning-of-text token is
    put in front. Passages carry weight 0 each on its own, never what stands between two of them.
    """
    group_of = {t: g for g, tokens in reflection.GROUPS.items() for t in tokens}
    tokens, weight, group = [tokenizer.bos_id], [0.0], [0]
    for parts, w in segments:
        for part in parts:
            ids = tokenizer.encode(part)
            name = group_of.get(part.token) if isinstance(part, Control) else None
            tokens += ids
            weight += [w * (group_weights[name] if name else 1.0)] * len(ids)
            group += [LOSS_GROUPS.index(name) if name else 0] * len(ids)
    return Example(np.array(tokens, np.int32), np.array(weight, np.float32), np.array(group, np.int8))


class Packer:
    """Fills batches of `rows` x `length` tokens from a source, starting at example `state`."""

    def __init__(self, source: Source, rows: int, length: int, max_targets: int, seed: int, state: int = 0):
        self.source, self.rows, self.length, self.max_targets = source, rows, length, max_targets
        self.seed, self.state = seed, state
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> list[int]:
        order = list(range(self.source.size))
        random.Random(f"order-{self.seed}-{epoch}").shuffle(order)
        return order

    def _example(self, i: int) -> Example:
        if self.source.size:
            epoch, at = divmod(i, self.source.size)
            i = self._order(epoch)[at]
        return self.source.example(i)

    def next(self) -> Batch:
        """The next batch; `state` moves on by the number of examples in it."""
        rows: list[list[Example]] = [[] for _ in range(self.rows)]
        used, targets, taken, truncated = [0] * self.rows, 0, 0, 0
        while True:
            e = self._example(self.state + taken)
            if len(e.tokens) > self.length:
                e = Example(*(a[: self.length] for a in (e.tokens, e.weight, e.group)))
                truncated += 1
            learned = int((e.weight[1:] > 0).sum())
            fits = [r for r in range(self.rows) if used[r] + len(e.tokens) <= self.length]
            if taken and (not fits or targets + learned > self.max_targets):
                break
            row = max(fits, key=lambda r: used[r])  # the fullest row that still has room
            rows[row].append(e)
            used[row] += len(e.tokens)
            targets += min(learned, self.max_targets)
            taken += 1
        self.state += taken
        return self._assemble(rows, taken, truncated)

    def _assemble(self, rows: list[list[Example]], taken: int, truncated: int) -> Batch:
        B, T, M = self.rows, self.length, self.max_targets
        tokens, positions, doc_ids = (np.zeros((B, T), np.int32) for _ in range(3))
        index, target, weight, group = [], [], [], []
        for b, examples in enumerate(rows):
            at = 0
            for d, e in enumerate(examples, 1):
                n = len(e.tokens)
                tokens[b, at : at + n], positions[b, at : at + n], doc_ids[b, at : at + n] = e.tokens, np.arange(n), d
                learned = np.nonzero(e.weight[1:] > 0)[0]
                index.append(b * T + at + learned)
                target.append(e.tokens[1:][learned])
                weight.append(e.weight[1:][learned])
                group.append(e.group[1:][learned])
                at += n
        pad = lambda parts, dtype: _padded(np.concatenate(parts).astype(dtype)[:M], M)  # noqa: E731
        return Batch(
            tokens, positions, doc_ids, pad(index, np.int32), pad(target, np.int32), pad(weight, np.float32),
            pad(group, np.int8), taken, truncated,
        )  # fmt: skip


def _padded(a: np.ndarray, n: int) -> np.ndarray:
    return np.concatenate([a, np.zeros(n - len(a), a.dtype)])
