"""The one retriever interface of the search: passages for questions, static or online."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from selfrag_jax import artifacts
from selfrag_jax.progress import progress
from selfrag_jax.records import BadInput, Passage, read_rows, text_field, to_json, write_jsonl
from selfrag_jax.retrieval.encoders import HashedEncoder
from selfrag_jax.retrieval.index import Index


class Retriever(Protocol):
    def passages(self, static: Sequence[tuple[Passage, ...]], queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Up to k passages for each query, best first. static: the passages that came with each question."""
        ...


class StaticRetriever:
    """The passages that stand in the question's own row, whatever the query (as published evaluation files have them)."""

    def passages(self, static: Sequence[tuple[Passage, ...]], queries: Sequence[str], k: int) -> list[list[Passage]]:
        return [list(p[:k]) for p in static]


class OnlineRetriever:
    """Searches an index with the query's embedding."""

    def __init__(self, index: str | Path):
        self.index = Index(index)
        self.encoder = HashedEncoder.load(Path(index))

    def passages(self, static: Sequence[tuple[Passage, ...]], queries: Sequence[str], k: int) -> list[list[Passage]]:
        if not queries:
            return []
        unique = list(dict.fromkeys(queries))
        rows, scores = self.index.search(self.encoder.encode(unique), k)
        found = {
            query: [
                replace(self.index.passages[r], score=float(s))
                for r, s in zip(rows[i], scores[i], strict=True)
                if not np.isnan(s)
            ]
            for i, query in enumerate(unique)
        }
        return [found[q] for q in queries]


def _query(where: str, row: dict) -> str:
    """The question, or the instruction with its input."""
    text = text_field(where, row, ("question", "instruction", "input"))
    if "question" not in row and row.get("instruction") and row.get("input"):
        text = f"{text} {text_field(where, row, 'input')}"
    return text


def retrieve_file(index: str | Path, input_path: str | Path, out: str | Path, k: int) -> int:
    """Adds `ctxs`, the k best passages for each row's question or instruction; returns the number of rows.

    Raises BadInput for k < 1 and for a row without a question; a k above the corpus size gives the whole corpus.
    """
    config, inputs = {"k": k}, {"index": index, "input": input_path}
    artifacts.require_finished(index, "index")
    if artifacts.is_finished(out, "retrieve", config, inputs):
        return 0
    rows = list(read_rows(input_path))
    if not rows:
        raise BadInput(f"{input_path}: holds no rows")
    queries = [_query(where, row) for where, row in rows]
    retriever = OnlineRetriever(index)
    n = len(retriever.index.passages)
    if k > n:
        print(f"--k={k} is more than the corpus holds; every row gets all {n} passages", file=sys.stderr)
    written = []
    with progress("retrieve", len(rows), "questions") as bar:
        for at in range(0, len(rows), 256):
            found = retriever.passages([()] * len(queries[at : at + 256]), queries[at : at + 256], k)
            written += [
                row | {"ctxs": [to_json(p) for p in ps]} for (_, row), ps in zip(rows[at : at + 256], found, strict=True)
            ]
            bar.advance(len(found))
    write_jsonl(out, written)
    artifacts.finish(out, "retrieve", config, inputs, {"rows": len(written)})
    return len(written)
