"""Ahead-of-time compilation of answering: what reading the prompts, and generating a segment for every passage, need on a TPU
slice that is not here. The search itself runs on the host (decoding/beam_search.py)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfrag_jax import reflection
from selfrag_jax.decoding import segments
from selfrag_jax.decoding.answer import AnswerConfig
from selfrag_jax.decoding.segments import TokenRules
from selfrag_jax.models import roofline, sharding
from selfrag_jax.models.llama import Cache, LlamaConfig, Model
from selfrag_jax.records import BadInput

_HEADS = PartitionSpec(None, None, "tensor", None, None)  # of a cache [L, B, K, S, H]


def lower(c: AnswerConfig, base: LlamaConfig, mesh: Mesh) -> dict[str, Any]:
    """The search's own jitted programs for the first segments of a batch of questions, at the greatest lengths of prompt and
    passage, by name, lowered.

    base: the model, its type and bits as they will run. Raises BadInput where the mesh does not divide its heads.
    """
    if base.num_kv_heads % mesh.shape["tensor"]:
        raise BadInput(f"{mesh.shape['tensor']} chips do not divide the model's {base.num_kv_heads} key-value heads")
    model, search, Q = Model(base), c.search, c.batch
    first = len(reflection.ALL)
    ids = reflection.lookup(lambda token: base.vocab_size - 1 - first + reflection.ALL.index(token))
    rules = TokenRules(2, base.vocab_size - 1, ids)
    whole = NamedSharding(mesh, PartitionSpec())
    shape = lambda s, p=whole: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p)  # noqa: E731
    rows = lambda kind, *size: jax.ShapeDtypeStruct(size, kind, sharding=whole)  # noqa: E731
    stored = jax.tree.map(
        lambda s: s if s.dtype == jnp.int8 or base.dtype == "float32" else s.update(dtype=base.dtype), model.shapes()
    )
    params = jax.tree.map(shape, stored, sharding.shardings(mesh, stored))
    prefix = jax.eval_shape(lambda: Cache.empty(base, Q, c.max_length))
    prefix = Cache(
        *(shape(x, NamedSharding(mesh, _HEADS)) for x in (prefix.k, prefix.v)),
        *(shape(x) for x in (prefix.valid, prefix.positions, prefix.cursor)),
    )
    B, T = Q * search.ndocs, c.max_length
    with jax.set_mesh(mesh):
        return {
            "prompts": segments.prefill.lower(model, params, rows(jnp.int32, Q, T), rows(bool, Q, T), T),
            "segment": segments.generate.lower(
                model, params, rules, prefix, rows(jnp.int32, B), rows(jnp.int32, B, T), rows(bool, B, T), search.max_new_tokens
            ),
        }


def times(c: AnswerConfig, base: LlamaConfig, mesh: Mesh, chip: roofline.Chip) -> dict[str, Any]:
    """The least seconds of the first segments of a batch of questions, as the chips' peak rates allow: reading prompts and
    passages (arithmetic), and a generated token of every branch (reading weights and caches)."""
    Q, B, T, new = c.batch, c.batch * c.search.ndocs, c.max_length, c.search.max_new_tokens
    read = Q * T * roofline.decode_flops_per_token(base, T / 2) + B * T * roofline.decode_flops_per_token(base, 1.5 * T)
    layer = 1 if base.quantized else jnp.dtype(base.dtype).itemsize
    tables = base.vocab_size * base.embed_dim  # the head is read in every step, of the embedding a few rows
    matrices = roofline.weights(base) - 2 * tables
    token = 2 * base.num_layers * base.num_kv_heads * base.head_dim * jnp.dtype(base.dtype).itemsize
    cached = token * (Q * T + B * (T + new / 2))
    step = (matrices * layer + tables * jnp.dtype(base.dtype).itemsize + cached) / (mesh.size * chip.memory_bandwidth)
    work = B * (roofline.decode_flops_per_token(base, 2 * T) + 2.0 * tables) / (mesh.size * chip.bf16_flops)
    reading = read / (mesh.size * chip.bf16_flops)
    total = reading + new * max(step, work)
    seconds = {"prompts_and_passages": reading, "generated_token": max(step, work), "segment": total}
    return {"roofline_seconds": seconds, "questions_per_second": Q / total}
