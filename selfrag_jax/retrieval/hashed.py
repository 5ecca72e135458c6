"""The hashed encoder: a lexical one that needs no training and suits small corpora and names.

It hashes words and character trigrams, weighted by their rarity in the corpus, into a few hundred
signed dimensions. Its one fitted part, the document frequency of each hash bucket, is stored beside
the embeddings, so that queries are encoded in the same way.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from selfrag_jax.files import read_object, write_json

ENCODER = "encoder.json"
_BUCKETS = 1 << 16
_WORD = re.compile(r"\w+")
_KNOWN_WORDS = 100_000  # whose features are remembered
_ADVANCE = 512  # texts between two reports of progress


class HashedEncoder:
    """Signed feature hashing of words and trigrams with inverse document frequencies."""

    def __init__(self, dim: int, word_weight: float, idf: Float32[np.ndarray, " buckets"]):
        """word_weight: of whole words, relative to trigrams."""
        self.dim, self.word_weight, self.idf = dim, word_weight, idf
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def fit(cls, dim: int, word_weight: float, texts: Iterable[str]) -> HashedEncoder:
        """Computes the document frequencies of a corpus."""
        seen, n = np.zeros(_BUCKETS, np.int64), 0
        known: dict[str, frozenset[int]] = {}
        for text in texts:
            buckets: set[int] = set()
            for word in set(_WORD.findall(text.lower())):
                if word not in known:
                    if len(known) >= _KNOWN_WORDS:
                        known.clear()
                    hashes = (h for h, _ in _features(word, word_weight))
                    known[word] = frozenset(h % _BUCKETS for h in hashes)
                buckets |= known[word]
            seen[list(buckets)] += 1
            n += 1
        return cls(dim, word_weight, np.log((n + 1) / (seen + 1)).astype(np.float32) + 0.05)

    def prepare(self, texts: Sequence[str], query: bool) -> tuple[Sequence[str], int]:
        return texts, 0

    def embed(
        self,
        prepared: Sequence[str],
        out: Float[np.ndarray, "n dim"],
        advance: Callable[[int], None],
    ) -> None:
        """Writes one unit vector per text into `out`; a text without letters gets a fixed one."""
        for start in range(0, len(prepared), _ADVANCE):
            texts = prepared[start : start + _ADVANCE]
            out[start : start + len(texts)] = self._encode(texts)
            advance(len(texts))

    def _encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dim"]:
        out = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(out, texts, strict=True):
            if words := [self._word(w) for w in _WORD.findall(text.lower())]:
                dimensions, values = (np.concatenate(x) for x in zip(*words, strict=True))
                np.add.at(row, dimensions, values)
        norm = np.linalg.norm(out, axis=1, keepdims=True)
        out[norm[:, 0] == 0, 0] = 1.0
        return out / np.where(norm == 0, 1.0, norm)

    def _word(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        """(dimensions, values) of a word and its trigrams; most words of a text are known."""
        if word not in self._known:
            if len(self._known) >= _KNOWN_WORDS:
                self._known.clear()
            features = list(_features(word, self.word_weight))
            dimensions = np.array([(h >> 3) % self.dim for h, _ in features])
            signs = np.array([1.0 if h & (1 << 31) else -1.0 for h, _ in features], np.float32)
            weights = np.array([weight for _, weight in features], np.float32)
            idf = self.idf[[h % _BUCKETS for h, _ in features]]
            self._known[word] = dimensions, signs * weights * idf
        return self._known[word]

    def save(self, folder: Path) -> None:
        default = self.idf.max()  # of all buckets that the corpus never hit
        idf = {str(i): round(float(v), 5) for i, v in enumerate(self.idf) if v != default}
        settings = {"kind": "hashed", "dim": self.dim, "word_weight": self.word_weight}
        write_json(folder / ENCODER, settings | {"default": float(default), "idf": idf})

    @classmethod
    def load(cls, folder: Path) -> HashedEncoder:
        row = read_object(folder / ENCODER, ("dim", "word_weight", "default", "idf"))
        idf = np.full(_BUCKETS, row["default"], np.float32)
        for i, v in row["idf"].items():
            idf[int(i)] = v
        return cls(row["dim"], row["word_weight"], idf)


def _features(word: str, word_weight: float) -> Iterable[tuple[int, float]]:
    """Yields (hash, weight) of a word and of its trigrams."""
    yield zlib.crc32(f"w:{word}".encode()), word_weight
    marked = f"^{word}$"
    for i in range(len(marked) - 2):
        yield zlib.crc32(f"t:{marked[i : i + 3]}".encode()), 1.0
