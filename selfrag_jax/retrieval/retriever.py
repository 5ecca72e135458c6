"""The retriever interface of the search: passages for questions, static or online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from selfrag_jax.records import Passage
from selfrag_jax.retrieval.encoders import HashedEncoder
from selfrag_jax.retrieval.index import Index


class Retriever(Protocol):
    def passages(
        self, static: Sequence[tuple[Passage, ...]], queries: Sequence[str], k: int
    ) -> list[list[Passage]]:
        """Returns up to k passages per query, best first.

        static: for each query, the passages in its question's own row.
        """
        ...


class StaticRetriever:
    """Returns the passages in the question's own row, as published evaluation files have them.

    The query is ignored.
    """

    def passages(
        self, static: Sequence[tuple[Passage, ...]], queries: Sequence[str], k: int
    ) -> list[list[Passage]]:
        return [list(p[:k]) for p in static]


class OnlineRetriever:
    """Searches an index for the query's embedding."""

    def __init__(self, index: str | Path):
        self.index = Index(index)
        self.encoder = HashedEncoder.load(Path(index))

    def passages(
        self, static: Sequence[tuple[Passage, ...]], queries: Sequence[str], k: int
    ) -> list[list[Passage]]:
        if not queries:
            return []
        unique = list(dict.fromkeys(queries))
        rows, scores = self.index.search(self.encoder.encode(unique), k)
        found = {
            query: [
                replace(self.index.passages[row], score=float(score))
                for row, score in zip(rows[i], scores[i], strict=True)
                if not np.isnan(score)  # padding
            ]
            for i, query in enumerate(unique)
        }
        return [found[q] for q in queries]
