"""An index: segments of passages that are searched together, and the encoder that made them.

    index.json    its segments, the file of removed rows, its measured recall
    encoder/      the encoder, weights included
    segments/     0000, and one more for each addition (segments.py)
    removed-N.npy sorted rows that no longer count; N goes up with each removal

Segments never change. An addition writes a new one, a removal a new list of rows; either counts
from the moment when index.json is replaced. So an open index goes on unharmed, and a killed command
leaves the index as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from selfrag_jax import artifacts
from selfrag_jax.errors import UserError
from selfrag_jax.files import atomic_write, read_json, read_object, write_json
from selfrag_jax.records import Passage
from selfrag_jax.retrieval.encoders import TextEncoder, encode_queries, open_encoder
from selfrag_jax.retrieval.plan import EXACT, IndexConfig, num_cores
from selfrag_jax.retrieval.segments import Found, Segment, merge, without
from selfrag_jax.retrieval.vectors import search_exactly

INDEX, ENCODER, SEGMENTS = "index.json", "encoder", "segments"
BACKENDS = ("scann", "device", "device_approximate")
_QUERIES_AT_ONCE = 32  # on each thread
_RECALL_K, _RECALL_WORDS, _EXACT_BLOCK = 10, 16, 1 << 15


class Index:
    """A finished index, open for search. Safe to share between threads.

    Its rows are numbered through all segments, in their order.
    """

    def __init__(self, folder: str | Path, backend: str = "scann", searchable: bool = True):
        """backend: "scann"; or "device": on the accelerators of this process, comparing every query
        with every vector; or "device_approximate". searchable: False to look up passages only.

        Raises UserError if the index is missing, unfinished, damaged or of an older version.
        """
        if backend not in BACKENDS:
            raise UserError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
        self.folder = artifacts.require_finished(folder, "index")
        if not (self.folder / INDEX).is_file():
            raise UserError(
                f"{folder}: has no {INDEX}: damaged, or of an older version; build it again"
            )
        fields = ("segments", "candidates", "removed")
        self.description: dict[str, Any] = read_object(self.folder / INDEX, fields)
        self.candidates: int = self.description["candidates"]
        names = self.description["segments"]
        with_codes = searchable and backend == "scann"
        self.segments = [Segment(self.folder / SEGMENTS / name, with_codes) for name in names]
        self.encoder: TextEncoder = open_encoder(self.folder / ENCODER)
        for segment in self.segments:
            if segment.vectors.dim != self.encoder.dim:
                raise UserError(
                    f"{segment.folder}: vectors of {segment.vectors.dim} dimensions, but the "
                    f"encoder has {self.encoder.dim}; build the index again"
                )
        sizes = [len(segment) for segment in self.segments]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        removed = self.description["removed"]
        self.removed = np.load(self.folder / removed) if removed else np.zeros(0, np.int64)
        self._threads = ThreadPoolExecutor(num_cores())
        self._device: Any = None
        if searchable and backend != "scann":
            from selfrag_jax.retrieval.device_search import DeviceSearch

            vectors = [segment.vectors for segment in self.segments]
            self._device = DeviceSearch(vectors, approximate=backend == "device_approximate")

    def __len__(self) -> int:
        """The number of passages, without the removed ones."""
        return int(self._starts[-1]) - len(self.removed)

    @property
    def has_bm25(self) -> bool:
        return all(segment.bm25 is not None for segment in self.segments)

    def passage(self, row: int) -> Passage:
        """Reads one passage from disk."""
        i = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.segments[i].store[row - int(self._starts[i])]

    def rows_of(self, ids: Sequence[str], removed: bool = False) -> Int64[np.ndarray, " n"]:
        """Returns the row of each id; -1 for one that is not there.

        One that was removed is not there, unless `removed`.
        """
        rows = np.full(len(ids), -1, np.int64)
        for segment, start in zip(self.segments, self._starts, strict=False):
            found = segment.store.rows_of(ids)
            found = np.where(found < 0, -1, found + start)
            if not removed:
                found = np.where(np.isin(found, self.removed), -1, found)
            rows = np.maximum(rows, found)
        return rows

    # ---- search ----------------------------------------------------------------------------------
    def search(
        self, queries: Float[np.ndarray, "q dim"], k: int, leaves: int | None = None
    ) -> Found:
        """Returns row numbers and inner products of the k nearest passages of each query.

        A k above the number of passages is reduced to it. leaves: of each part, to visit; default:
        as the index was built. Raises UserError for k < 1 and for queries that are not finite or of
        another dimension.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.encoder.dim:
            raise UserError(
                f"queries of shape {list(queries.shape)}; expected [n, {self.encoder.dim}]"
            )
        if not np.isfinite(queries).all():
            raise UserError("a query vector holds NaN or infinite values")

        k = self._checked_k(k)
        rows, scores = self._search_segments(queries, k, leaves)
        # Removed passages may have taken the places of others, and few leaves may hold too few.
        total, count, again = int(self._starts[-1]), k, True
        while again and len(short := np.flatnonzero((rows < 0).any(axis=1))):
            count = min(4 * count, total)
            again = count < total
            more, more_scores = self._search_segments(queries[short], count, _ALL_LEAVES)
            rows[short], scores[short] = more[:, :k], more_scores[:, :k]
        return rows, scores

    def search_bm25(self, queries: Sequence[str], k: int) -> list[Int64[np.ndarray, "q k"]]:
        """Returns the rows of each segment's k best passages by BM25; -1 after the last.

        Segments are not merged: their scores rest on word counts of their own.
        """
        k = self._checked_k(k)
        rankings = []
        for i, segment in enumerate(self.segments):
            assert segment.bm25 is not None
            removed, count = self._removed_of(i), k
            while True:
                rows, _ = without(segment.bm25.search(queries, count), removed)
                order = np.argsort(rows < 0, axis=1, kind="stable")[:, :k]  # removed ones last
                enough = not len(removed) or (np.sum(rows >= 0, axis=1) >= min(k, count)).all()
                if enough or count >= len(segment):
                    break
                count = min(4 * count, len(segment))
            rows = np.take_along_axis(rows, order, 1)
            rankings.append(np.where(rows < 0, -1, rows + self._starts[i]))
        return rankings

    def _checked_k(self, k: int) -> int:
        """k, reduced to the number of passages. Raises UserError for k < 1."""
        if k < 1:
            raise UserError(f"k={k}: must be at least 1")
        return min(k, len(self))

    def _removed_of(self, i: int) -> Int64[np.ndarray, " m"]:
        """The removed rows of segment i, by its own numbers."""
        first, after = self._starts[i], self._starts[i + 1]
        at = np.searchsorted(self.removed, [first, after])
        return self.removed[at[0] : at[1]] - first

    def _search_segments(
        self, queries: Float32[np.ndarray, "q dim"], k: int, leaves: int | None
    ) -> Found:
        """Searches all segments; many queries in parallel, or the parts for few."""
        if self._device is not None:
            return self._search_device(queries, k)

        def search(block: np.ndarray, pool: Executor | None) -> Found:
            found = []
            for i, segment in enumerate(self.segments):
                rows, scores = segment.search(
                    block, k, self.candidates, pool, leaves, self._removed_of(i)
                )
                found.append((np.where(rows < 0, -1, rows + self._starts[i]), scores))
            return _padded(merge(found, k), k)

        size = _QUERIES_AT_ONCE
        blocks = [queries[i : i + size] for i in range(0, len(queries), size)]
        if len(blocks) <= 1:
            return search(queries, self._threads)
        results = self._threads.map(lambda block: search(block, None), blocks)
        rows, scores = (list(x) for x in zip(*results, strict=True))
        return np.concatenate(rows), np.concatenate(scores)

    def _search_device(self, queries: Float32[np.ndarray, "q dim"], k: int) -> Found:
        """Rescores the best rows of the devices, whose scores are rounded, from disk."""
        # A power of two, so that few programs are compiled.
        count = min(1 << (2 * k + 15).bit_length(), int(self._starts[-1]))
        rows, _ = without(self._device.search(queries, count), self.removed)
        found = []
        for i, segment in enumerate(self.segments):
            inside = (rows >= self._starts[i]) & (rows < self._starts[i + 1])
            own, scores = segment.rescore(queries, np.where(inside, rows - self._starts[i], -1), k)
            found.append((np.where(np.isnan(scores), -1, own + self._starts[i]), scores))
        return _padded(merge(found, k), k)


def _padded(found: Found, k: int) -> Found:
    """Results as k columns: -1 and NaN behind the last."""
    missing = k - found[0].shape[1]
    if missing <= 0:
        return found
    behind = ((0, 0), (0, missing))
    rows = np.pad(found[0], behind, constant_values=-1)
    return rows, np.pad(found[1], behind, constant_values=np.nan)


_ALL_LEAVES = 1 << 30


# ---- writing -------------------------------------------------------------------------------------
def write_index(folder: Path, segments: Sequence[str], candidates: int, **more: Any) -> None:
    """Writes index.json: from now on the folder has these segments."""
    fields = {"segments": list(segments), "candidates": candidates, "removed": ""}
    write_json(folder / INDEX, fields | more)


def write_removed(folder: Path, rows: Int64[np.ndarray, " n"]) -> None:
    """Replaces the removed rows of an index."""
    row = read_json(folder / INDEX)
    last = int(row["removed"].removeprefix("removed-").removesuffix(".npy") or 0)
    name = f"removed-{last + 1}.npy"
    with atomic_write(folder / name, "wb") as f:
        np.save(f, np.unique(rows))
    write_json(folder / INDEX, row | {"removed": name})


def measure_recall(segment: Segment, encoder: TextEncoder, config: IndexConfig) -> dict[str, Any]:
    """Returns recall@10 of one segment against exact search.

    The queries are the first words of passages, drawn by the seed and encoded as queries: they tell
    what compression loses, not how good answers will be.
    """
    if segment.structure == EXACT or not config.recall_queries:
        return {"recall@10": 1.0, "queries": 0}
    rng = np.random.default_rng(config.seed)
    rows = rng.choice(len(segment), min(len(segment), config.recall_queries), replace=False)
    passages = [segment.store[int(row)] for row in np.sort(rows)]
    texts = [" ".join((p.text or p.title).split()[:_RECALL_WORDS]) for p in passages]
    queries, _ = encode_queries(encoder, texts)
    exact, _ = search_exactly(segment.vectors, queries, _RECALL_K, _EXACT_BLOCK)
    found, _ = segment.search(queries, _RECALL_K, config.candidates, None)
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)]
    return {
        "recall@10": round(sum(hits) / exact.size, 4),
        "queries": len(texts),
        "of": f"the first {_RECALL_WORDS} words of passages",
    }
