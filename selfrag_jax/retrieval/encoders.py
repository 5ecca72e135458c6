"""Encoders from text to unit vectors, and the embeddings of a corpus on disk.

`hashed` is a lexical encoder: it hashes words and character trigrams, weighted by their rarity in
the corpus, into a few hundred signed dimensions. It needs no training and suits small corpora and
names. Its one fitted part, the document frequency of each hash bucket, is stored next to the
embeddings, so that queries are encoded in the same way.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from selfrag_jax.errors import UserError
from selfrag_jax.files import atomic_write, read_json, write_json
from selfrag_jax.progress import progress
from selfrag_jax.records import Passage

EMBEDDINGS, ENCODER, PASSAGES = "embeddings.npy", "encoder.json", "passages.tsv"
_BUCKETS = 1 << 16
_BATCH = 512  # passages encoded at once


@dataclass(frozen=True)
class EncoderConfig:
    name: str  # "hashed"
    dim: int
    word_weight: float  # of whole words relative to trigrams

    def __post_init__(self):
        if self.name != "hashed":
            raise UserError(f"--encoder={self.name!r}: unknown; available: hashed")
        if self.dim < 8:
            raise UserError(f"encoder dim={self.dim}: must be at least 8")


class HashedEncoder:
    """Signed feature hashing of words and trigrams with inverse document frequencies."""

    def __init__(self, config: EncoderConfig, idf: Float32[np.ndarray, " buckets"]):
        self.config, self.idf = config, idf

    @classmethod
    def fit(cls, config: EncoderConfig, texts: Iterable[str]) -> HashedEncoder:
        """Computes the document frequencies of a corpus."""
        seen, n = np.zeros(_BUCKETS, np.int64), 0
        for text in texts:
            seen[list({h % _BUCKETS for h, _ in _features(text, config.word_weight)})] += 1
            n += 1
        return cls(config, np.log((n + 1) / (seen + 1)).astype(np.float32) + 0.05)

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dim"]:
        """Returns one unit vector per text; a text without letters gets a fixed one."""
        out = np.zeros((len(texts), self.config.dim), np.float32)
        for row, text in zip(out, texts, strict=True):
            for h, weight in _features(text, self.config.word_weight):
                sign = 1.0 if h & (1 << 31) else -1.0
                row[(h >> 3) % self.config.dim] += sign * weight * self.idf[h % _BUCKETS]
        norm = np.linalg.norm(out, axis=1, keepdims=True)
        out[norm[:, 0] == 0, 0] = 1.0
        return out / np.where(norm == 0, 1.0, norm)

    def save(self, folder: Path) -> None:
        default = self.idf.max()  # of all buckets that the corpus never hit
        idf = {str(i): round(float(v), 5) for i, v in enumerate(self.idf) if v != default}
        row = {"config": vars(self.config), "default": float(default), "idf": idf}
        write_json(folder / ENCODER, row)

    @classmethod
    def load(cls, folder: Path) -> HashedEncoder:
        row = read_json(folder / ENCODER)
        idf = np.full(_BUCKETS, row["default"], np.float32)
        for i, v in row["idf"].items():
            idf[int(i)] = v
        return cls(EncoderConfig(**row["config"]), idf)


def _features(text: str, word_weight: float) -> Iterable[tuple[int, float]]:
    """Yields (hash, weight) of the words and trigrams of `text`."""
    for word in re.findall(r"\w+", text.lower()):
        yield zlib.crc32(f"w:{word}".encode()), word_weight
        marked = f"^{word}$"
        for i in range(len(marked) - 2):
            yield zlib.crc32(f"t:{marked[i : i + 3]}".encode()), 1.0


def indexed_text(p: Passage) -> str:
    """The text of a passage that is embedded and searched."""
    return f"{p.title} {p.text}" if p.title else p.text


def write_embeddings(passages: Sequence[Passage], config: EncoderConfig, out: Path) -> None:
    """Fits an encoder to a corpus; writes it and embeddings.npy [n, dim] float32 to `out`."""
    encoder = HashedEncoder.fit(config, (indexed_text(p) for p in passages))
    vectors = []
    with progress("embed", len(passages), "passages") as bar:
        for i in range(0, len(passages), _BATCH):
            batch = passages[i : i + _BATCH]
            vectors.append(encoder.encode([indexed_text(p) for p in batch]))
            bar.advance(len(batch))
    with atomic_write(out / EMBEDDINGS, "wb") as f:
        np.save(f, np.concatenate(vectors))
    encoder.save(out)


def read_embeddings(folder: Path) -> Float[np.ndarray, "n dim"]:
    """Returns the vectors of an `embed` artifact, memory-mapped."""
    return np.load(folder / EMBEDDINGS, mmap_mode="r")
