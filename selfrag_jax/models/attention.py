"""Attention in plain XLA operations: dense, over a key-value cache, and blockwise.

`dense_attention` is the reference. `cached_attention` serves decoding. `blockwise_attention` serves
long sequences in training. Kernels of TPUs and GPUs are in attention_kernels.py.

Axis letters as in llama.py; t and s are the queries and keys of one block. Scores are f32. They are
computed with heads before tokens, and the G query heads of a kv head are extra rows of one matrix
product: on a CPU, XLA runs these products and their gradients up to four times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

BLOCK_SIZE = 128  # queries per block; rows shorter than two blocks are attended to whole
MASKED_SCORE = -1e30  # finite, so that a fully masked row gives no NaN
ATTENTION_OUTPUT = "attention"  # checkpoint name of what remat="dots" saves, see llama.REMAT


# ---- masks ---------------------------------------------------------------------------------------
def document_mask(doc_ids: Int[Array, "B T"], window: int | None = None) -> Bool[Array, "B T T"]:
    """Returns the causal mask of packed rows: a query sees its own document only.

    doc_ids: 0 is padding. window: tokens that a query sees, itself included.
    """
    T = doc_ids.shape[1]
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    visible = _is_visible(distance, window)
    return (doc_ids[:, :, None] == doc_ids[:, None, :]) & visible


def _is_visible(distance: Int[Array, "T S"], window: int | None) -> Bool[Array, "T S"]:
    """distance: query position minus key position."""
    if window is None:
        return distance >= 0
    return (distance >= 0) & (distance < window)


# ---- dense attention -----------------------------------------------------------------------------
def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Softmax attention with all scores in memory. Every query must see at least one key."""
    q, k, v = _heads_first(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    B, K, G, T, H = q.shape
    scores = jnp.einsum(
        "BKTH,BKSH->BKTS", q.reshape(B, K, G * T, H), k, preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask[:, None, None], scores.reshape(B, K, G, T, -1), MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKTS,BKSH->BKTH", weights.reshape(B, K, G * T, -1), v)
    return _heads_last(out.reshape(B, K, G, T, H))


# ---- attention over a cache ----------------------------------------------------------------------
def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    prefix_k: Float[Array, "R K H Sp"] | None = None,
    prefix_v: Float[Array, "R K Sp H"] | None = None,
    prefix_mask: Bool[Array, " R #P #T Sp"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention over a cache and, if given, the prefix that P = B / R branches share.

    The prefix is not copied to its branches: each part is computed by itself, relative to the
    largest score of both (as in Hydragen, arXiv 2402.05099). Every query must see at least one key.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    G = N // K

    def product(form, *arrays):
        return jnp.einsum(form, *arrays, preferred_element_type=jnp.float32)

    q = _heads_first(q, K)
    scores = product("BKTH,BKHS->BKTS", _merge_groups(q), k).reshape(B, K, G, T, -1)
    scores = jnp.where(mask[:, None, None], scores, MASKED_SCORE)
    max_score = scores.max(-1, keepdims=True)
    if prefix_k is not None:
        R, P = prefix_k.shape[0], B // prefix_k.shape[0]
        # One product per prefix: the queries of all of its branches are the rows.
        prefix_q = q.reshape(R, P, K, -1, H).swapaxes(1, 2).reshape(R, K, -1, H)
        prefix_scores = product("RKTH,RKHS->RKTS", prefix_q, prefix_k)
        prefix_scores = prefix_scores.reshape(R, K, P, G, T, -1).swapaxes(1, 2)
        if prefix_mask is not None:
            prefix_scores = jnp.where(prefix_mask[:, :, None, None], prefix_scores, MASKED_SCORE)
        prefix_max = prefix_scores.max(-1, keepdims=True)
        max_score = jnp.maximum(max_score, prefix_max.reshape(max_score.shape))
    weights = jnp.exp(scores - max_score)
    total = weights.sum(-1, keepdims=True)
    out = product("BKTS,BKSH->BKTH", _merge_groups(weights).astype(v.dtype), v)
    out = out.reshape(B, K, G, T, H)
    if prefix_k is not None:
        weights = jnp.exp(prefix_scores - max_score.reshape(R, P, K, G, T, 1))
        total = total + weights.sum(-1, keepdims=True).reshape(total.shape)
        weights = weights.astype(v.dtype).swapaxes(1, 2).reshape(R, K, P * G * T, -1)
        prefix_out = product("RKTS,RKSH->RKTH", weights, prefix_v).reshape(R, K, P, G, T, H)
        out = out + prefix_out.swapaxes(1, 2).reshape(out.shape)
    return _heads_last((out / total).astype(v.dtype))


# ---- blockwise attention -------------------------------------------------------------------------
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    doc_ids: Int[Array, "B T"],
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Equals `dense_attention` with `document_mask`, computed one block of queries at a time.

    A block is not multiplied with later keys, which saves nearly half of the products. The backward
    pass is that of FlashAttention (Dao et al., 2022, Section 3.1): it recomputes the weights from
    the log-sum-exp of the scores, and the softmax's row term from the output.
    """
    return _blockwise_forward(q, k, v, doc_ids, window)[0]


def _blockwise_forward(q, k, v, doc_ids, window):
    qs, ks, vs = _heads_first(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    outs, log_sums = [], []
    for queries, keys, mask in _blocks(doc_ids, window):
        scores = _block_scores(qs, ks, queries, keys, mask)
        max_score = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - max_score)
        total = weights.sum(-1, keepdims=True)
        rows = _merge_groups(weights).astype(v.dtype)
        out = jnp.einsum(
            "BKTS,BKSH->BKTH", rows, vs[:, :, keys], preferred_element_type=jnp.float32
        )
        outs.append((out.reshape(*weights.shape[:-1], -1) / total).astype(v.dtype))
        log_sums.append(max_score + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, 3), ATTENTION_OUTPUT)
    lse = checkpoint_name(jnp.concatenate(log_sums, 3), ATTENTION_OUTPUT)
    return _heads_last(out), (q, k, v, doc_ids, out, lse)


def _blockwise_backward(window, residuals, d_out):
    q, k, v, doc_ids, out, lse = residuals
    ks, vs = k.swapaxes(1, 2), v.swapaxes(1, 2)
    qs, d = _heads_first(q, k.shape[2]), _heads_first(d_out, k.shape[2], 1.0)
    row_term = (d.astype(jnp.float32) * out).sum(-1, keepdims=True)
    d_q_blocks = []
    d_k, d_v = jnp.zeros(ks.shape, jnp.float32), jnp.zeros(vs.shape, jnp.float32)
    for queries, keys, mask in _blocks(doc_ids, window):
        scores = _block_scores(qs, ks, queries, keys, mask)
        weights = jnp.exp(scores - lse[:, :, :, queries])
        d_rows, q_rows = _merge_groups(d[:, :, :, queries]), _merge_groups(qs[:, :, :, queries])
        d_weights = jnp.einsum(
            "BKTH,BKSH->BKTS", d_rows, vs[:, :, keys], preferred_element_type=jnp.float32
        )
        d_scores = weights * (d_weights.reshape(weights.shape) - row_term[:, :, :, queries])
        shape = d_scores.shape[:-1]
        d_scores = _merge_groups(d_scores).astype(q.dtype)
        weights = _merge_groups(weights).astype(v.dtype)
        d_q = jnp.einsum("BKTS,BKSH->BKTH", d_scores, ks[:, :, keys]).reshape(*shape, -1)
        d_q_blocks.append(d_q * (q.shape[-1] ** -0.5))
        d_k = d_k.at[:, :, keys].add(
            jnp.einsum("BKTS,BKTH->BKSH", d_scores, q_rows, preferred_element_type=jnp.float32)
        )
        d_v = d_v.at[:, :, keys].add(
            jnp.einsum("BKTS,BKTH->BKSH", weights, d_rows, preferred_element_type=jnp.float32)
        )
    d_q = _heads_last(jnp.concatenate(d_q_blocks, 3))
    return d_q, d_k.swapaxes(1, 2).astype(k.dtype), d_v.swapaxes(1, 2).astype(v.dtype), None


blockwise_attention.defvjp(_blockwise_forward, _blockwise_backward)


def _blocks(
    doc_ids: Int[Array, "B T"], window: int | None
) -> Iterator[tuple[slice, slice, Bool[Array, "B t s"]]]:
    """Yields (queries, keys that they may see, mask) for each block of t queries and s keys."""
    T = doc_ids.shape[1]
    for start in range(0, T, BLOCK_SIZE):
        stop = min(start + BLOCK_SIZE, T)
        first_key = 0 if window is None else max(0, start - window + 1)
        queries, keys = slice(start, stop), slice(first_key, stop)
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first_key, stop)
        visible = _is_visible(distance, window)
        yield queries, keys, (doc_ids[:, queries, None] == doc_ids[:, None, keys]) & visible


def _block_scores(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K T H"],
    queries: slice,
    keys: slice,
    mask: Bool[Array, "B t s"],
) -> Float[Array, "B K G t s"]:
    q = q[:, :, :, queries]
    scores = jnp.einsum(
        "BKTH,BKSH->BKTS", _merge_groups(q), k[:, :, keys], preferred_element_type=jnp.float32
    )
    return jnp.where(mask[:, None, None], scores.reshape(*q.shape[:-1], -1), MASKED_SCORE)


# ---- layouts -------------------------------------------------------------------------------------
def _heads_first(
    q: Float[Array, "B T N H"], num_kv_heads: int, scale: float | None = None
) -> Float[Array, "B K G T H"]:
    """Groups query heads by kv head and scales them, by 1 / sqrt(H) unless `scale` is given."""
    B, T, _, H = q.shape
    q = q.reshape(B, T, num_kv_heads, -1, H) * (H**-0.5 if scale is None else scale)
    return q.transpose(0, 2, 3, 1, 4)


def _heads_last(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _merge_groups(x: Float[Array, "B K G t s"]) -> Float[Array, "B K G*t s"]:
    """Makes the queries of all heads of a kv head the rows of one matrix product."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
