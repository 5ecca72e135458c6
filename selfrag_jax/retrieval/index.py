"""A ScaNN index over passage embeddings (Guo et al., 2020): asymmetric hashing, exact rescoring.

Small corpora are searched by ScaNN's brute force, larger ones through a partitioning tree. Ids are
row numbers of the stored passages; ScaNN's own pickled ids are not used. Three pitfalls are handled
here: results are padded if fewer neighbours exist than were requested, NaN aborts the process, and
tiny corpora cannot train a hasher.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int64

from selfrag_jax import artifacts
from selfrag_jax.errors import UserError
from selfrag_jax.files import write_json
from selfrag_jax.progress import progress
from selfrag_jax.retrieval import corpus
from selfrag_jax.retrieval.encoders import EMBEDDINGS, ENCODER, PASSAGES, read_embeddings

SCANN = "scann"


@dataclass(frozen=True)
class IndexConfig:
    brute_force_below: int  # passages; smaller corpora are searched exhaustively
    leaves_search_fraction: float  # of the tree's leaves that a query visits
    dimensions_per_block: int  # of the asymmetric hashing
    reorder: int  # candidates that are rescored exactly

    def __post_init__(self):
        if not 0 < self.leaves_search_fraction <= 1:
            raise UserError(
                f"leaves_search_fraction={self.leaves_search_fraction}: must be in (0, 1]"
            )


def checked_vectors(embeddings: Path) -> Float32[np.ndarray, "n dim"]:
    """Returns the vectors of an `embed` artifact. Raises UserError if one is not finite."""
    vectors = np.ascontiguousarray(read_embeddings(embeddings), np.float32)
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise UserError(f"{embeddings / EMBEDDINGS}: row {row} holds NaN or infinite values")
    return vectors


def write_index(
    vectors: Float32[np.ndarray, "n dim"], config: IndexConfig, embeddings: Path, out: Path
) -> None:
    """Builds the index of `vectors` in the new folder `out`, with the passages and the encoder."""
    import scann

    n = len(vectors)
    k = min(n, 100)
    builder = scann.scann_ops_pybind.builder(vectors, k, "dot_product")
    if n < config.brute_force_below:
        builder = builder.score_brute_force()
    else:
        leaves = max(1, int(np.sqrt(n)))
        searched = max(1, round(leaves * config.leaves_search_fraction))
        builder = (
            builder.tree(leaves, searched, training_sample_size=min(n, 250_000))
            .score_ah(config.dimensions_per_block, anisotropic_quantization_threshold=0.2)
            .reorder(max(k, config.reorder))
        )
    (out / SCANN).mkdir(parents=True)
    with progress("index", n, "passages") as bar:  # one call of ScaNN, which reports no progress
        builder.build().serialize(str((out / SCANN).absolute()), relative_path=True)
        bar.advance(n)
    shutil.copy(embeddings / PASSAGES, out / PASSAGES)
    shutil.copy(embeddings / ENCODER, out / ENCODER)
    write_json(out / "size.json", {"passages": n})


class Index:
    """A finished index and its passages. Raises UserError if it is unfinished or inconsistent."""

    def __init__(self, folder: str | Path):
        import scann

        folder = artifacts.require_finished(folder, "index")
        self.folder = folder
        self.passages = corpus.read_corpus(folder / PASSAGES)
        size = json.loads((folder / "size.json").read_text())["passages"]
        if size != len(self.passages):
            raise UserError(
                f"{folder}: {size} vectors but {len(self.passages)} passages; "
                "rebuild it with `selfrag index`"
            )
        self.searcher = scann.scann_ops_pybind.load_searcher(str((folder / SCANN).absolute()))

    def search(
        self, queries: Float[np.ndarray, "n dim"], k: int
    ) -> tuple[Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """Returns row numbers and inner products of the k nearest passages of each query.

        A k above the corpus size is reduced to it. Raises UserError for non-finite queries and for
        k < 1.
        """
        if k < 1:
            raise UserError(f"k={k}: must be at least 1")
        if not np.isfinite(queries).all():
            raise UserError("a query vector holds NaN or infinite values")
        k = min(k, len(self.passages))
        rows, scores = self.searcher.search_batched(
            np.ascontiguousarray(queries, np.float32), final_num_neighbors=k
        )
        return rows.astype(np.int64), scores
