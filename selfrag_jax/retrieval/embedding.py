"""Embeds a corpus, file by file: passages/, encoder/ and vectors/ of a folder.

The texts of one file of vectors are in memory at a time, and those of the next, which are tokenized
meanwhile. A file that is already written is skipped; the others come out the same whoever writes
them on devices of one kind and number, so hosts may share the work and an interrupted run
continues.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax.artifacts import remove_temporary_files
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json
from selfrag_jax.progress import progress
from selfrag_jax.retrieval.corpus import Corpus
from selfrag_jax.retrieval.encoders import (
    HASHED,
    EncoderConfig,
    TextEncoder,
    fit_hashed,
    indexed_text,
    load_model,
    open_encoder,
)
from selfrag_jax.retrieval.passages import COUNTS, PassageStore, write_passages
from selfrag_jax.retrieval.pickles import read_pickled_embeddings
from selfrag_jax.retrieval.vectors import (
    LAYOUT,
    VectorLayout,
    check_finite,
    create_array,
    write_vectors,
)

PASSAGES, VECTORS, ENCODER = "passages", "vectors", "encoder"


@dataclass
class EmbeddingWork:
    """A corpus that is being embedded into a folder."""

    folder: Path
    store: PassageStore
    encoder: TextEncoder
    layout: VectorLayout

    @classmethod
    def start(cls, folder: Path, corpus: Corpus, config: EncoderConfig) -> EmbeddingWork:
        """Reads the corpus and makes the encoder, or opens what an earlier run left of them."""
        is_saved, model = (folder / ENCODER).is_dir(), None
        if config.name != HASHED and not is_saved:
            model = load_model(config)  # what is wrong with it is said before the corpus is read
        remove_temporary_files(folder / PASSAGES)
        write_passages(corpus, folder / PASSAGES)
        store = PassageStore(folder / PASSAGES)
        if not is_saved:
            unfinished = folder / f".{ENCODER}.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            (model or fit_hashed(config, store)).save(unfinished)
            unfinished.rename(folder / ENCODER)
        encoder = model or open_encoder(folder / ENCODER, config.batch_tokens)
        layout = VectorLayout(len(store), encoder.dim, config.vector_dtype, config.rows_per_file)
        return cls._with_layout(folder, store, encoder, layout)

    @classmethod
    def start_addition(
        cls, folder: Path, corpus: Corpus, encoder: TextEncoder, like: VectorLayout
    ) -> EmbeddingWork:
        """Reads a corpus that is added to an index, whose encoder and layout it takes."""
        write_passages(corpus, folder / PASSAGES)
        store = PassageStore(folder / PASSAGES)
        layout = VectorLayout(len(store), like.dim, like.dtype, like.rows_per_file)
        return cls._with_layout(folder, store, encoder, layout)

    @classmethod
    def _with_layout(
        cls, folder: Path, store: PassageStore, encoder: TextEncoder, layout: VectorLayout
    ) -> EmbeddingWork:
        if not (folder / VECTORS / LAYOUT).is_file():
            layout.write(folder / VECTORS)
        return cls(folder, store, encoder, VectorLayout.read(folder / VECTORS))

    def missing(self) -> list[int]:
        """The files of vectors that are not written yet."""
        return self.layout.missing(self.folder / VECTORS)

    def counts(self) -> dict[str, int]:
        """What the manifest counts: passages, and rows of the corpus that were left out."""
        return self.store.counts

    def embed(self, mine: Sequence[int] | None = None) -> None:
        """Writes those of the files of vectors that are missing; mine: of these only."""
        mine = range(self.layout.num_files) if mine is None else mine
        missing = set(self.missing())
        files = [f for f in mine if f in missing]

        def size(files: Sequence[int]) -> int:
            return sum(b - a for a, b in map(self.layout.rows_of_file, files))

        with progress("embed", size(mine), "passages", done=size(mine) - size(files)) as bar:
            num_cut = self._embed_files(files, bar.advance)
        if num_cut:
            print(
                f"{num_cut:,} passages are longer than the encoder takes and were cut",
                file=sys.stderr,
            )

    def _embed_files(self, files: Sequence[int], advance: Any) -> int:
        """Writes those files; returns how many passages were cut."""

        def prepare(f: int) -> tuple[Any, int]:
            texts = [indexed_text(p) for p in self.store.read(*self.layout.rows_of_file(f))]
            return self.encoder.prepare(texts, False)

        num_cut = 0
        with ThreadPoolExecutor(1) as pool:
            waiting = [pool.submit(prepare, f) for f in files[:1]]
            for i, f in enumerate(files):
                prepared, cut = waiting.pop().result()
                waiting += [pool.submit(prepare, following) for following in files[i + 1 : i + 2]]
                first, after = self.layout.rows_of_file(f)
                vectors = np.empty((after - first, self.layout.dim), self.layout.dtype)
                self.encoder.embed(prepared, vectors, advance)
                write_vectors(self.layout.file(self.folder / VECTORS, f), vectors, first)
                num_cut += cut
        return num_cut

    def import_pickled(self, sources: Sequence[Path]) -> None:
        """Writes all files of vectors from published pickles of (ids, vectors), in any order.

        Raises UserError naming the pickle for an id that the corpus does not have or has twice, for
        vectors of another dimension or that are not finite, and for passages without a vector.
        """
        unfinished = self.folder / ".imported.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            self._import(sources, unfinished)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _import(self, sources: Sequence[Path], unfinished: Path) -> None:
        layout, arrays = self.layout, []
        for f in range(layout.num_files):
            first, after = layout.rows_of_file(f)
            shape = (after - first, layout.dim)
            arrays.append(create_array(layout.file(unfinished, f), layout.dtype, shape))
        filled = np.zeros(layout.rows, bool)
        with progress("read vectors", layout.rows, "passages") as bar:
            for source in sources:
                ids, vectors = read_pickled_embeddings(source)
                if vectors.shape[1] != layout.dim:
                    raise UserError(
                        f"{source}: vectors of {vectors.shape[1]} dimensions; "
                        f"the encoder has {layout.dim}"
                    )
                with np.errstate(over="ignore"):
                    vectors = vectors.astype(layout.dtype)
                check_finite(vectors, source, 0)
                rows = self._rows_of(source, ids, filled)
                filled[rows] = True
                for f, array in enumerate(arrays):
                    first, after = layout.rows_of_file(f)
                    inside = (rows >= first) & (rows < after)
                    if inside.any():
                        array[rows[inside] - first] = vectors[inside]
                bar.advance(len(ids))
        if not filled.all():
            raise UserError(
                f"{len(filled) - int(filled.sum()):,} passages have no vector, the first is "
                f"{self.store[int(np.argmin(filled))].id!r}; give all files of the embeddings"
            )
        for f, array in enumerate(arrays):
            array.flush()
            layout.file(unfinished, f).rename(layout.file(self.folder / VECTORS, f))

    def _rows_of(self, source: Path, ids: list[str], filled: np.ndarray) -> np.ndarray:
        rows = self.store.rows_of(ids)
        if (rows < 0).any():
            unknown = ids[int(np.argmax(rows < 0))]
            raise UserError(f"{source}: id {unknown!r} is not in the corpus; is it another one?")
        if filled[rows].any() or len(np.unique(rows)) < len(rows):
            raise UserError(f"{source}: holds passages that have a vector already; given twice?")
        return rows


def missing_files(folder: Path) -> list[int]:
    """The files of vectors that embeddings lack."""
    return VectorLayout.read(folder / VECTORS).missing(folder / VECTORS)


def num_passages(folder: Path) -> int:
    """The number of passages of finished embeddings."""
    return read_json(folder / PASSAGES / COUNTS)["passages"]
