"""A ScaNN index over passage embeddings (Guo et al., 2020): asymmetric hashing, then exact rescoring.

Small corpora are searched exhaustively by ScaNN's brute force, larger ones through a partitioning tree. Ids are row
numbers of the stored passages; ScaNN's own pickled ids are not used. Pitfalls handled here: fewer neighbours than
asked for come back padded, NaN aborts the process, and tiny corpora cannot train a hasher.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfrag_jax import artifacts
from selfrag_jax.progress import progress
from selfrag_jax.records import BadInput, write_json
from selfrag_jax.retrieval import corpus
from selfrag_jax.retrieval.encoders import EMBEDDINGS, ENCODER, PASSAGES

SCANN = "scann"


@dataclass(frozen=True)
class IndexConfig:
    brute_force_below: int  # passages; smaller corpora are searched exhaustively
    leaves_search_fraction: float  # of the tree's leaves that a query visits
    dimensions_per_block: int  # of the asymmetric hashing
    reorder: int  # candidates rescored exactly

    def __post_init__(self):
        if not 0 < self.leaves_search_fraction <= 1:
            raise BadInput(f"leaves_search_fraction={self.leaves_search_fraction}: must be in (0, 1]")


def build(embeddings: str | Path, config: IndexConfig, out: str | Path) -> int:
    """Builds the index of an `embed` artifact; returns the number of passages. Finished already, it does nothing.

    Raises BadInput when embeddings are unfinished or hold NaN.
    """
    import scann

    embeddings, out = artifacts.require_finished(embeddings, "embed"), Path(out)
    inputs = {"embeddings": embeddings}
    vectors = np.load(embeddings / EMBEDDINGS, mmap_mode="r")
    if artifacts.is_finished(out, "index", config, inputs):
        return len(vectors)
    vectors = np.ascontiguousarray(vectors, np.float32)
    if not np.isfinite(vectors).all():
        row = int(np.nonzero(~np.isfinite(vectors).all(1))[0][0])
        raise BadInput(f"{embeddings / EMBEDDINGS}: row {row} holds NaN or infinite values")
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out}: is not empty and was not made by `selfrag index`; choose another --out")
    n = len(vectors)
    k = min(n, 100)
    builder = scann.scann_ops_pybind.builder(vectors, k, "dot_product")
    if n < config.brute_force_below:
        builder = builder.score_brute_force()
    else:
        leaves = max(1, int(np.sqrt(n)))
        builder = (
            builder.tree(leaves, max(1, round(leaves * config.leaves_search_fraction)), training_sample_size=min(n, 250_000))
            .score_ah(config.dimensions_per_block, anisotropic_quantization_threshold=0.2)
            .reorder(max(k, config.reorder))
        )
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / SCANN).mkdir(parents=True)
    with progress("index", n, "passages") as bar:  # ScaNN builds in one call, which tells nothing on the way
        builder.build().serialize(str((temporary / SCANN).absolute()), relative_path=True)
        bar.advance(n)
    shutil.copy(embeddings / PASSAGES, temporary / PASSAGES)
    shutil.copy(embeddings / ENCODER, temporary / ENCODER)
    write_json(temporary / "size.json", {"passages": n})
    artifacts.finish(temporary, "index", config, inputs, {"passages": n})
    if out.exists():
        out.rmdir()  # empty, as checked above
    temporary.rename(out)
    return n


class Index:
    """A finished index with its passages and encoder folder."""

    def __init__(self, folder: str | Path):
        import scann

        folder = artifacts.require_finished(folder, "index")
        self.folder = folder
        self.passages = corpus.read(folder / PASSAGES)
        size = json.loads((folder / "size.json").read_text())["passages"]
        if size != len(self.passages):
            raise BadInput(f"{folder}: {size} vectors but {len(self.passages)} passages; rebuild it with `selfrag index`")
        self.searcher = scann.scann_ops_pybind.load_searcher(str((folder / SCANN).absolute()))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers [n, k'] and inner products [n, k'] of the nearest passages, k' = min(k, corpus size).

        Raises BadInput for non-finite queries and for k < 1.
        """
        if k < 1:
            raise BadInput(f"k={k}: must be at least 1")
        if not np.isfinite(queries).all():
            raise BadInput("a query vector holds NaN or infinite values")
        k = min(k, len(self.passages))
        rows, scores = self.searcher.search_batched(np.ascontiguousarray(queries, np.float32), final_num_neighbors=k)
        return rows.astype(np.int64), scores
