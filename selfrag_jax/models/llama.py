"""Llama as one function for training and decoding (Touvron et al., 2023; grouped-query attention as in Llama-2 70B).

Axis letters, used the same everywhere:
  B batch   T query length   S cache length   R prefixes (B = R * P)   P branches of one prefix
  N query heads   K kv heads   G = N / K   H head dim   D embed   F mlp   V vocabulary   L layers

`Model.hidden` maps tokens to final hidden states, `Model.logits` maps hidden states to the vocabulary, so that a
caller computes logits only where it needs them. The key-value cache is explicit. A cache may stand on a `prefix`: a
second, read-only cache of R rows that the P consecutive branch rows r*P .. r*P+P-1 share, so that all passages of a
question read one copy of their common history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = Any  # a nested dict of arrays; the layers of a stack share one array with a leading axis L


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int  # tokens the model was trained to attend over
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    dtype: str  # of activations, e.g. "bfloat16"
    remat: bool  # recompute layers in the backward pass
    scan_unroll: int  # layers unrolled per scan step: 1 compiles fastest

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")


@jax.tree_util.register_dataclass
@dataclass
class Cache:
    """Keys and values of past tokens. Slots are written in order of time, so causality is the order of slots."""

    k: jax.Array  # [L, B, S, K, H]
    v: jax.Array  # [L, B, S, K, H]
    valid: jax.Array  # [B, S] bool: False for padding and for slots not yet written
    cursor: jax.Array  # [] int32: the next slot to write, shared by all rows

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, length: int) -> Cache:
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        dtype = jnp.dtype(config.dtype)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, length), bool), jnp.int32(0))


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, half rotation. x: [B, T, N, H], positions: [B, T]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q, k, v, mask, prefix_k=None, prefix_v=None, prefix_valid=None):
    """Softmax attention over [prefix, own] keys without copying the prefix to its branches.

    q: [B, T, N, H]; k, v: [B, S, K, H]; mask: [B, T, S] bool; prefix_k, prefix_v: [R, S', K, H] with B = R * P;
    prefix_valid: [R, S']. Returns [B, T, N, H]. Every query must see at least one key.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H) * (H**-0.5)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    if prefix_k is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)
    R = prefix_k.shape[0]
    shared_q = q.reshape(R, B // R, T, K, N // K, H)
    shared = jnp.einsum("RPTKGH,RSKH->RPKGTS", shared_q, prefix_k, preferred_element_type=jnp.float32)
    shared = jnp.where(prefix_valid[:, None, None, None, None], shared, -1e30)
    S_prefix = prefix_k.shape[1]
    scores = jnp.concatenate([shared.reshape(B, K, N // K, T, S_prefix), scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    shared_weights = weights[..., :S_prefix].reshape(R, B // R, K, N // K, T, S_prefix)
    out = jnp.einsum("RPKGTS,RSKH->RPTKGH", shared_weights, prefix_v).reshape(B, T, K, N // K, H)
    out = out + jnp.einsum("BKGTS,BSKH->BTKGH", weights[..., S_prefix:], v)
    return out.reshape(B, T, N, H)


def _linear(c: LlamaConfig, inputs: int, outputs: int, rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs, outputs, use_bias=False, rngs=rngs, dtype=jnp.dtype(c.dtype), kernel_init=nnx.initializers.lecun_normal()
    )


def _norm(c: LlamaConfig, rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(c.embed_dim, epsilon=c.norm_eps, rngs=rngs, dtype=jnp.dtype(c.dtype))


class Block(nnx.Module):
    def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
        self.c = c
        self.attention_norm, self.mlp_norm = _norm(c, rngs), _norm(c, rngs)
        self.q = _linear(c, c.embed_dim, c.num_heads * c.head_dim, rngs)
        self.k = _linear(c, c.embed_dim, c.num_kv_heads * c.head_dim, rngs)
        self.v = _linear(c, c.embed_dim, c.num_kv_heads * c.head_dim, rngs)
        self.o = _linear(c, c.num_heads * c.head_dim, c.embed_dim, rngs)
        self.gate = _linear(c, c.embed_dim, c.mlp_dim, rngs)
        self.up = _linear(c, c.embed_dim, c.mlp_dim, rngs)
        self.down = _linear(c, c.mlp_dim, c.embed_dim, rngs)

    def __call__(self, x, positions, mask, cache_k, cache_v, cursor, prefix):
        """x: [B, T, D]; mask: [B, T, S]; cache_k, cache_v: [B, S, K, H] or None. Returns x and the new cache rows."""
        c, (B, T, _) = self.c, x.shape
        h = self.attention_norm(x)
        q = rope(self.q(h).reshape(B, T, c.num_heads, c.head_dim), positions, c.rope_theta)
        k = rope(self.k(h).reshape(B, T, c.num_kv_heads, c.head_dim), positions, c.rope_theta)
        v = self.v(h).reshape(B, T, c.num_kv_heads, c.head_dim)
        if cache_k is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache_k, k, cursor, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache_v, v, cursor, axis=1)
        x = x + self.o(attend(q, k, v, mask, *prefix).reshape(B, T, -1))
        h = self.mlp_norm(x)
        x = x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))
        return x, (k, v) if cache_k is not None else None


class Llama(nnx.Module):
    def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
        self.c = c
        self.embed = nnx.Embed(
            c.vocab_size, c.embed_dim, rngs=rngs, dtype=jnp.dtype(c.dtype), embedding_init=nnx.initializers.normal(0.02)
        )
        make = nnx.split_rngs(splits=c.num_layers)(nnx.vmap(lambda r: Block(c, r), in_axes=0, out_axes=0))
        self.layers = make(rngs)
        self.norm = _norm(c, rngs)
        if not c.tie_embeddings:
            self.head = _linear(c, c.embed_dim, c.vocab_size, rngs)

    def hidden(self, tokens, positions, mask, cache: Cache | None, prefix: Cache | None):
        graph, layers = nnx.split(self.layers)
        prefix_valid = None if prefix is None else prefix.valid

        def layer(x, per_layer):
            state, cache_kv, prefix_kv = per_layer
            shared = () if prefix_kv is None else (*prefix_kv, prefix_valid)
            k, v = (None, None) if cache_kv is None else cache_kv
            cursor = None if cache is None else cache.cursor
            return nnx.merge(graph, state)(x, positions, mask, k, v, cursor, shared)

        if self.c.remat:
            layer = jax.checkpoint(layer)
        per_layer = (
            layers,
            None if cache is None else (cache.k, cache.v),
            None if prefix is None else (prefix.k, prefix.v),
        )
        x, new = jax.lax.scan(layer, self.embed(tokens), per_layer, unroll=self.c.scan_unroll)
        return self.norm(x), new

    def logits(self, hidden):
        out = self.embed.attend(hidden) if self.c.tie_embeddings else self.head(hidden)
        return out.astype(jnp.float32)


@dataclass(frozen=True)
class Model:
    """The model as pure functions of its parameters; hashable, so a jitted function can take it as a static argument."""

    config: LlamaConfig

    def init(self, key: jax.Array, embed_std: float = 0.02) -> Params:
        """Random parameters (f32) as a nested dict.

        What is written into the residual stream starts at 1 / sqrt(2 L) of its usual scale (Radford et al., 2019), and
        a narrow model wants embeddings of a standard deviation near 0.5 rather than Llama's 0.02: else the first
        layers drown the embeddings, and copying takes many times longer to learn. With tied embeddings the last norm
        starts at 1 / (embed_std * sqrt(D)), so that the first logits have unit scale.
        """
        params = nnx.to_pure_dict(nnx.state(Llama(self.config, nnx.Rngs(params=key)), nnx.Param))
        for module in ("o", "down"):
            params["layers"][module]["kernel"] *= (2 * self.config.num_layers) ** -0.5
        params["embed"]["embedding"] *= embed_std / 0.02
        if self.config.tie_embeddings:
            params["norm"]["scale"] *= min(1.0, 1 / (embed_std * self.config.embed_dim**0.5))
        return params

    def shapes(self) -> Params:
        """The parameters as jax.ShapeDtypeStructs, without allocating them."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def _merge(self, params: Params) -> Llama:
        graph, state = nnx.split(nnx.eval_shape(lambda: Llama(self.config, nnx.Rngs(params=jax.random.key(0)))))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Cache | None = None,
        prefix: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states of `tokens`.

        tokens, positions: [B, T] int32. Without a cache, mask: [B, T, T] bool, True where a query may see a key. With a
        cache, mask: [B, T] bool, True for real tokens: they are written at `cache.cursor` and see all valid earlier
        slots and themselves. prefix: a cache of R rows shared by B / R branches each; it is read, not written.
        Returns hidden [B, T, D] and the updated cache (None without one).
        """
        module = self._merge(params)
        if cache is None:
            return module.hidden(tokens, positions, mask, None, prefix)[0], None
        T, S = tokens.shape[1], cache.k.shape[2]
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, mask, cache.cursor, axis=1)
        causal = jnp.arange(S) <= cache.cursor + jnp.arange(T)[:, None]
        own = jnp.arange(S) == cache.cursor + jnp.arange(T)[:, None]  # padding sees itself, so that no row is empty
        attention_mask = (valid[:, None, :] & causal) | own
        hidden, (k, v) = module.hidden(tokens, positions, attention_mask, cache, prefix)
        return hidden, Cache(k, v, valid, cache.cursor + T)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] in f32."""
        return self._merge(params).logits(hidden)


def causal_mask(doc_ids: jax.Array) -> jax.Array:
    """[B, T] document ids of packed rows (0 is padding) -> [B, T, T]: causal, and no attention across documents."""
    T = doc_ids.shape[1]
    causal = jnp.arange(T)[:, None] >= jnp.arange(T)
    return (doc_ids[:, :, None] == doc_ids[:, None, :]) & causal


def count_parameters(params: Params) -> int:
    return sum(int(x.size) for x in jax.tree.leaves(params))
