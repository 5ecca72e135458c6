"""The interface of the search to passages: an index, or anything with `search(queries, k)`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, passage_from
from selfrag_jax.retrieval import bm25
from selfrag_jax.retrieval.encoders import encode_queries
from selfrag_jax.retrieval.index import Index

# Reciprocal-rank fusion (Cormack et al., 2009), whose offset is 60 and whose weights are equal.
# These found most on English text (launch/benchmarks/README.md).
_FUSION_OFFSET, _BM25_WEIGHT = 5, 0.5
_FUSION_DEPTH = 100  # results of each ranking that are fused, at least


class Retriever(Protocol):
    """What `SelfRAG.load(retriever=...)` takes: Elasticsearch, a web search, a vector database.

    A result is a Passage, or a dict with `text` and optionally `title`, `id` and `score`.
    """

    def search(self, queries: Sequence[str], k: int) -> Sequence[Sequence[Any]]:
        """Returns up to k passages for each query, best first."""
        ...


def search_passages(retriever: Retriever, queries: Sequence[str], k: int) -> list[list[Passage]]:
    """Asks a retriever and checks what it returns: up to k passages for each query.

    Raises UserError naming the retriever and the query if it returned anything else.
    """
    if not queries:
        return []
    name = type(retriever).__name__
    found = retriever.search(queries, k)
    if not isinstance(found, Sequence) or len(found) != len(queries):
        what = f"{len(found)} results" if isinstance(found, Sequence) else type(found).__name__
        raise UserError(f"{name}.search returned {what} for {len(queries)} queries")
    return [_checked(name, q, results)[:k] for q, results in zip(queries, found, strict=True)]


def _checked(name: str, query: str, results: Any) -> list[Passage]:
    where = f"{name}.search({query[:60]!r})"
    if not isinstance(results, Sequence) or isinstance(results, str):
        raise UserError(f"{where}: expected a list of passages, found {type(results).__name__}")
    return [
        p if isinstance(p, Passage) else passage_from(where, p, i) for i, p in enumerate(results)
    ]


class IndexRetriever:
    """Searches an index made by `selfrag index`. Safe to share between threads."""

    def __init__(self, index: str | Path, backend: str = "scann", mix: str | None = None):
        """backend: one of index.BACKENDS: ScaNN, or search on accelerators (device_search.py).

        mix: "bm25" fuses the ranking with BM25's, "none" does not; default: bm25 if the index has
        it. Raises UserError if the index is missing, unfinished or damaged, or has no BM25.
        """
        if mix not in (None, *bm25.MIXES):
            raise UserError(f"mix={mix!r}: must be one of {', '.join(bm25.MIXES)}")
        self.index = Index(index, backend)
        if mix == bm25.NAME and not self.index.has_bm25:
            raise UserError(
                f"{index}: has no BM25; build it with `selfrag index --mix={bm25.NAME}`"
            )
        self.mixes = self.index.has_bm25 and mix in (None, bm25.NAME)
        self._notice_lock, self._noticed = threading.Lock(), False

    def __repr__(self) -> str:
        words = " with BM25" if self.mixes else ""
        return f"index of {len(self.index):,} passages{words}"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Returns the k best passages of each query with their scores, best first.

        Equal queries are searched once. Raises UserError for an empty query and for k < 1.
        """
        if isinstance(queries, str):
            raise UserError("queries: expected a list of texts, found one text")
        if empty := [i for i, q in enumerate(queries) if not q.strip()]:
            raise UserError(f"query {empty[0] + 1} of {len(queries)} is empty")
        if k < 1:
            raise UserError(f"k={k}: must be at least 1")
        k = min(k, len(self.index))
        unique = list(dict.fromkeys(queries))
        vectors, num_cut = encode_queries(self.index.encoder, unique)
        if num_cut:
            self._notice(num_cut)
        if self.mixes:
            rows, scores = self._fused(unique, vectors, k)
        else:
            rows, scores = self.index.search(vectors, k)
        found = {
            query: [
                replace(self.index.passage(int(row)), score=float(score))
                for row, score in zip(rows[i], scores[i], strict=True)
                if row >= 0
            ]
            for i, query in enumerate(unique)
        }
        return [found[q] for q in queries]

    def _fused(
        self, queries: Sequence[str], vectors: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reciprocal-rank fusion: the weighted sum of 1 / (offset + rank) over both rankings."""
        depth = max(k, _FUSION_DEPTH)
        dense, _ = self.index.search(vectors, depth)
        lexical = self.index.search_bm25(queries, depth)
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), np.nan, np.float32)
        for i in range(len(queries)):
            sums: dict[int, float] = {}
            rankings = [(dense[i], 1.0), *((found[i], _BM25_WEIGHT) for found in lexical)]
            for ranking, weight in rankings:
                for rank, row in enumerate(ranking[ranking >= 0].tolist(), 1):
                    sums[row] = sums.get(row, 0.0) + weight / (_FUSION_OFFSET + rank)
            best = sorted(sums.items(), key=lambda item: -item[1])[:k]  # stable: dense first
            rows[i, : len(best)] = [row for row, _ in best]
            scores[i, : len(best)] = [score for _, score in best]
        return rows, scores

    def _notice(self, num_cut: int) -> None:
        """Says once that queries are cut."""
        with self._notice_lock:
            if self._noticed:
                return
            self._noticed = True
        print(
            f"retrieval: {num_cut} queries are longer than the encoder takes and were cut; "
            "later ones will be cut without notice",
            file=sys.stderr,
        )
