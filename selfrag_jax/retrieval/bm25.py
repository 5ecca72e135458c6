"""BM25 over the passages of an index (Robertson and Zaragoza, 2009), through the library bm25s.

bm25s computes the score of every term in every passage beforehand. They are one sparse matrix on
disk, which is memory-mapped. Building it needs the words of all passages in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from selfrag_jax.errors import UserError

NAME = "bm25"
MIXES = ("none", NAME)  # rankings that are fused with that of the vectors
BUILD_BYTES = 2_900  # of memory for a passage of 100 words, while the index is built; measured


def _tokens(texts: Iterable[str], as_ids: bool) -> Any:
    import bm25s

    pattern = r"(?u)\b\w+\b"  # bm25s' own leaves out words of one letter
    return bm25s.tokenize(
        list(texts), token_pattern=pattern, return_ids=as_ids, show_progress=False
    )


def write_bm25(texts: Iterable[str], folder: Path) -> None:
    """Builds the index of some texts in the folder `folder`."""
    import bm25s

    texts = list(texts)
    tokens = _tokens(texts, True)
    if not tokens.vocab:  # signs and stop words only
        tokens = bm25s.tokenize(texts, token_pattern=r"\S", stopwords=None, show_progress=False)
    model = bm25s.BM25()
    model.index(tokens, show_progress=False)
    model.save(folder, show_progress=False)


class BM25Index:
    """A finished BM25 index, memory-mapped."""

    def __init__(self, folder: Path):
        """Raises UserError if a file is missing or damaged."""
        import bm25s

        try:
            self._model = bm25s.BM25.load(folder, mmap=True, show_progress=False)
            self._n = int(self._model.scores["num_docs"])
        except (OSError, ValueError, KeyError, EOFError) as e:
            raise UserError(f"{folder}: is damaged ({e}); build the index again") from None

    def search(
        self, queries: Sequence[str], k: int
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
        """Returns rows and scores, best first; -1 and 0 after the last one with a query word."""
        k = min(k, self._n)
        rows, scores = self._model.retrieve(
            _tokens(queries, False), k=k, backend_selection="numpy", show_progress=False
        )
        return np.where(scores > 0, rows, -1).astype(np.int64), scores
