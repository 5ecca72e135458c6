"""Ahead-of-time compilation of retrieval: search on the devices, and embedding a corpus.

The sizes come from a config of kind index: `corpus` and `encoder_architecture`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfrag_jax.compilation.decode import bytes_per_chip
from selfrag_jax.models import roofline, sharding
from selfrag_jax.models.encoder import BertConfig, Encoder
from selfrag_jax.models.params import Params
from selfrag_jax.retrieval.device_search import QUERIES, padded_rows, search_program
from selfrag_jax.retrieval.sentence_encoder import ACCELERATOR_TOKENS

K = 100  # passages found for each query
ROW_TOKENS = 192  # padded length of a batch's texts; most passages of 100 words are shorter
_VECTOR_DTYPE = jnp.dtype("bfloat16")


@dataclass(frozen=True)
class CorpusSize:
    """A corpus, for programs that are compiled without its text."""

    passages: int
    dim: int  # of its vectors
    tokens_per_passage: int  # on average


# ---- search --------------------------------------------------------------------------------------
def lower_search(c: CorpusSize, mesh: Mesh) -> dict[str, jax.stages.Lowered]:
    """Lowers the exact and the approximate search of one batch of queries, by label."""
    rows = padded_rows(c.passages, mesh.size)
    split, everywhere = PartitionSpec(sharding.AXES), PartitionSpec()
    vectors = _array(mesh, (rows, c.dim), _VECTOR_DTYPE, split)
    queries = _array(mesh, (QUERIES, c.dim), jnp.float32, everywhere)
    return {
        label: search_program(mesh, K, c.passages, approximate).lower(vectors, queries)
        for label, approximate in (("exact", False), ("approximate", True))
    }


def search_roofline_times(c: CorpusSize, mesh: Mesh, chip: roofline.Chip) -> dict[str, Any]:
    """Returns the least seconds of a batch of queries, and the most queries per second.

    A chip reads its n vectors once, n * D * 2 bytes, and multiplies them with Q queries,
    2 * Q * n * D FLOPs; the batch takes the longer of the two. Selecting the best is left out.
    """
    elements = padded_rows(c.passages, mesh.size) // mesh.size * c.dim
    seconds = {
        "arithmetic": 2.0 * QUERIES * elements / chip.bf16_flops,
        "memory": _VECTOR_DTYPE.itemsize * elements / chip.memory_bandwidth,
    }
    batch = max(seconds.values())
    return {
        "roofline_seconds": seconds | {"batch": batch},
        "roofline_queries_per_second": QUERIES / batch,
    }


# ---- embedding -----------------------------------------------------------------------------------
def batch_rows(mesh: Mesh) -> int:
    """Returns the texts of a full batch, as SentenceEncoder has them on accelerators."""
    return ACCELERATOR_TOKENS // ROW_TOKENS * mesh.size


def lower_embed(base: BertConfig, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the encoder for a full batch, with mean pooling and vectors of any length."""
    encoder, rows = Encoder(base), batch_rows(mesh)
    tokens = _array(mesh, (rows, ROW_TOKENS), jnp.int32, sharding.BATCH)
    lengths = _array(mesh, (rows,), jnp.int32, sharding.BATCH)
    run = jax.jit(partial(encoder.embed, pooling="mean", normalize=False))
    with jax.set_mesh(mesh):
        return run.lower(_described_params(encoder, mesh), tokens, lengths)


def embed_roofline_times(
    c: CorpusSize, base: BertConfig, mesh: Mesh, chip: roofline.Chip
) -> dict[str, Any]:
    """Returns the model FLOPs per token, and the least times of a batch and of the corpus.

    A batch takes the longer of its FLOPs and of reading the weights once. Batches are taken as
    full: texts are sorted by length, so few of their tokens are padding. Then passages per second
    are tokens per second / tokens_per_passage.
    """
    tokens = batch_rows(mesh) * ROW_TOKENS
    flops_per_token = roofline.encoder_flops_per_token(base, ROW_TOKENS)
    weight_bytes = bytes_per_chip(_described_params(Encoder(base), mesh))
    seconds = {
        "arithmetic": tokens * flops_per_token / (mesh.size * chip.bf16_flops),
        "memory": weight_bytes / chip.memory_bandwidth,
    }
    batch = max(seconds.values())
    passages_per_second = tokens / batch / c.tokens_per_passage
    return {
        "model_flops_per_token": flops_per_token,
        "roofline_seconds": seconds | {"batch": batch},
        "roofline_passages_per_second": passages_per_second,
        "roofline_hours_for_corpus": c.passages / passages_per_second / 3600,
    }


def _described_params(encoder: Encoder, mesh: Mesh) -> Params:
    """Returns the parameters (f32) as jax.ShapeDtypeStructs, whole on every chip."""
    return jax.tree.map(lambda x: _array(mesh, x.shape, x.dtype, PartitionSpec()), encoder.shapes())


def _array(
    mesh: Mesh, shape: tuple[int, ...], dtype: Any, axes: PartitionSpec
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes))
