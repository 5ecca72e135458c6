"""A segment of an index: passages, their vectors, and what searches them. It never changes.

    segment.json   its structure and parts
    passages/      passages.arrow and the lookup of ids (passages.py)
    vectors/       float vectors (vectors.py)
    parts/00 ...   ScaNN's files, one folder a part (scann_files.py); none for exact search
    bm25/          where asked for (bm25.py)

An index has one segment; each addition to it makes another.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int64

from selfrag_jax.files import read_object, write_json
from selfrag_jax.progress import progress
from selfrag_jax.retrieval import bm25, scann_files
from selfrag_jax.retrieval.embedding import PASSAGES, VECTORS
from selfrag_jax.retrieval.encoders import indexed_text
from selfrag_jax.retrieval.passages import PassageStore
from selfrag_jax.retrieval.plan import EXACT, INT8, IndexConfig, Plan
from selfrag_jax.retrieval.quantization import num_training_steps, train_quantizer
from selfrag_jax.retrieval.vectors import VectorFiles, as_float32, check_finite, top_k

_LEAST_LEAVES = 16  # that a query visits, of parts that have few
_QUERIES, _CANDIDATES = (1, 8, 32), (16, 32, 50, 100, 200, 400)  # shapes of rescoring
PARTS, BM25 = "parts", "bm25"
_SEGMENT = "segment.json"
_NONE = np.zeros(0, np.int64)
_SPARE = 16  # rows beside the k best whose scores may be as good but for the last digits
Found = tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]  # rows, scores


def write_segment(folder: Path, plan: Plan, config: IndexConfig, with_bm25: bool) -> None:
    """Builds the parts of a folder that has its passages and vectors; skips finished parts."""
    vectors = VectorFiles(folder / VECTORS)
    leaves_searched = max(_LEAST_LEAVES, round(plan.leaves * config.leaves_search_fraction))
    leaves_searched = min(leaves_searched, max(1, plan.leaves))
    for i, rows in enumerate(plan.parts):
        part = folder / PARTS / f"{i:02d}"
        if not part.is_dir():
            name = "index" if len(plan.parts) == 1 else f"index {i + 1}/{len(plan.parts)}"
            _write_part(part, name, vectors, rows, plan, config, leaves_searched)
    if with_bm25 and not (folder / BM25).is_dir():
        store = PassageStore(folder / PASSAGES)
        unfinished = _fresh(folder / f".{BM25}.tmp")
        with progress("bm25", len(store), "passages") as bar:
            bm25.write_bm25((indexed_text(p) for p in store), unfinished)
            bar.advance(len(store))
        unfinished.rename(folder / BM25)
    made = asdict(plan)
    kept = ("structure", "parts", "dims_per_block", "leaves")  # what does not depend on the machine
    write_json(folder / _SEGMENT, {k: made[k] for k in kept} | {"leaves_searched": leaves_searched})


def _write_part(
    part: Path,
    name: str,
    vectors: VectorFiles,
    rows: tuple[int, int],
    plan: Plan,
    config: IndexConfig,
    leaves_searched: int,
) -> None:
    start, stop = rows
    unfinished = _fresh(part.with_name(f".{part.name}.tmp"))
    sample = vectors.sample(plan.sample, config.seed, start, stop)
    with progress(f"{name}: train", num_training_steps(), "steps") as bar:
        quantizer = train_quantizer(
            sample, plan.leaves, plan.dims_per_block, config.seed, bar.advance
        )
    del sample
    int8_range = vectors.largest(start, stop) if plan.structure == INT8 else None
    with progress(name, stop - start, "passages") as bar:
        scann_files.write_part(
            unfinished,
            vectors,
            rows,
            quantizer,
            int8_range,
            leaves_searched,
            config.candidates,
            bar.advance,
        )
    unfinished.rename(part)


def _fresh(folder: Path) -> Path:
    """A folder's name without what an interrupted run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


class Segment:
    """An open segment. Row numbers are its own, from 0. Safe to share between threads."""

    def __init__(self, folder: Path, searchable: bool = True):
        """searchable: False to leave the codes on disk, for passages and vectors alone.

        Raises UserError if a file is missing, damaged or of another shape.
        """
        self.folder = folder
        made = read_object(folder / _SEGMENT, ("structure", "parts", "leaves", "leaves_searched"))
        self.structure: str = made["structure"]
        self.num_leaves, self.leaves_searched = made["leaves"], made["leaves_searched"]
        self.starts = [start for start, _ in made["parts"]]
        self.store = PassageStore(folder / PASSAGES)
        self.vectors = VectorFiles(folder / VECTORS, "build the index again")
        self.parts: list[Any] = []
        self.all_vectors = None
        if not searchable:
            pass
        elif self.structure == EXACT:
            self.all_vectors = np.empty((len(self.vectors), self.vectors.dim), np.float32)
            row = 0
            for block in self.vectors.blocks(1 << 14):
                check_finite(block, self.vectors.folder, row)
                self.all_vectors[row : row + len(block)] = as_float32(block)
                row += len(block)
        else:
            for i, (start, stop) in enumerate(made["parts"]):
                part = folder / PARTS / f"{i:02d}"
                self.parts.append(scann_files.open_part(part, stop - start))
        self.bm25 = bm25.BM25Index(folder / BM25) if (folder / BM25).is_dir() else None

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self,
        queries: Float32[np.ndarray, "q dim"],
        k: int,
        candidates: int,
        pool: Executor | None,
        leaves: int | None = None,
        removed: Int64[np.ndarray, " m"] = _NONE,
    ) -> Found:
        """Returns the k best rows of each query and their scores; -1 and NaN where there are fewer.

        candidates: vectors that the codes select and that are rescored. pool: searches the parts.
        leaves: of each part, to visit; default: as built. removed: rows that do not count, sorted.
        """
        if self.all_vectors is not None:
            scores = queries @ self.all_vectors.T
            scores[:, removed] = np.nan
            all_rows = np.broadcast_to(np.arange(len(self)), scores.shape)
            rows, _ = without(merge([(all_rows, scores)], k + _SPARE), removed)
            return merge([(rows, self._exact_scores(queries, rows))], k)
        n = max(k, candidates)
        leaves = min(leaves or self.leaves_searched, self.num_leaves)

        def search_part(i: int) -> Found:
            final = n
            if self.structure == INT8:  # rescored by ScaNN; a few more in the place of removed ones
                final = min(n, 2 * k) if len(removed) else k
            rows, scores = self.parts[i].search_batched(
                queries,
                final_num_neighbors=final,
                pre_reorder_num_neighbors=n,
                leaves_to_search=leaves,
            )
            found = ~np.isnan(scores)  # shorter results are padded with row 0
            return np.where(found, rows.astype(np.int64) + self.starts[i], -1), scores

        found = list((pool.map if pool else map)(search_part, range(len(self.parts))))
        rows, scores = without(merge(found, n), removed)
        if self.structure == INT8:
            return merge([(rows, scores)], k)
        return self.rescore(queries, rows, k)

    def _exact_scores(
        self, queries: Float32[np.ndarray, "q dim"], rows: Int64[np.ndarray, "q n"]
    ) -> Float32[np.ndarray, "q n"]:
        """Inner products that depend on a query and a vector alone; NaN for row -1.

        The last digits of a matrix product depend on the number of threads and of queries. A sum in
        float64, rounded to float32, does not.
        """
        assert self.all_vectors is not None
        scores = np.full(rows.shape, np.nan, np.float32)
        for query, of_query, out in zip(queries, rows, scores, strict=True):
            found = of_query >= 0
            vectors = self.all_vectors[of_query[found]]
            out[found] = np.einsum("nd,d->n", vectors, query, dtype=np.float64)
        return scores

    def rescore(
        self, queries: Float32[np.ndarray, "q dim"], rows: Int64[np.ndarray, "q n"], k: int
    ) -> Found:
        """The best k of some rows by their inner products, from the vectors on disk."""
        num_queries, n = rows.shape
        shape = _padded(num_queries, _QUERIES), _padded(n, _CANDIDATES)
        padded = np.full(shape, -1, np.int64)
        padded[:num_queries, :n] = rows
        padded_queries = np.zeros((shape[0], queries.shape[1]), np.float32)
        padded_queries[:num_queries] = queries
        # Row 0 stands for missing ones: it is in the cache, and not looked at.
        vectors = self.vectors.take(np.maximum(padded, 0).ravel()).reshape(*shape, -1)
        scores = np.array(_inner_products(vectors, padded_queries))
        scores[padded < 0] = np.nan
        return merge([(padded[:num_queries], scores[:num_queries])], k)


@jax.jit
def _inner_products(
    vectors: Float[Array, "q n dim"], queries: Float32[Array, "q dim"]
) -> Float32[Array, "q n"]:
    """Compiled, because NumPy converts float16 five times more slowly than it multiplies."""
    return jnp.einsum("qnd,qd->qn", vectors.astype(jnp.float32), queries, precision="highest")


def _padded(n: int, sizes: tuple[int, ...]) -> int:
    """The next of some sizes, or power of two above them: few shapes are compiled."""
    return next((size for size in sizes if size >= n), 1 << (n - 1).bit_length())


def without(found: Found, removed: Int64[np.ndarray, " m"]) -> Found:
    """Results with removed rows replaced by -1 and NaN."""
    rows, scores = found
    if not len(removed):
        return found
    gone = np.isin(rows, removed)
    return np.where(gone, -1, rows), np.where(gone, np.nan, scores).astype(np.float32)


def merge(found: Iterable[Found], k: int) -> Found:
    """The best k of several results; NaN counts as worst."""
    rows, scores = (np.concatenate(x, axis=1) for x in zip(*found, strict=True))
    best, _ = top_k(np.where(np.isnan(scores), -np.inf, scores), k)
    return np.take_along_axis(rows, best, 1), np.take_along_axis(scores, best, 1)
