"""Attention of Llama models, and the rotary embedding of their positions. Axis letters as in llama.py.

Whole sequences (training, no cache) take the fastest kernel of the platform, one switch for all:

  xla      plain einsums, everywhere; the reference. Long rows go block by block, with the backward pass written out
  splash   jax's Pallas kernel for TPUs: never holds the [T, T] scores
  cudnn    cuDNN's flash attention through jax.nn.dot_product_attention, on NVIDIA GPUs
  auto     splash on TPU and cudnn on GPU where the shapes allow it, else xla

Decoding attends over a cache and over a prefix that branches share; there the plain form reads each key once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

KERNELS = ("auto", "xla", "splash", "cudnn")
BLOCK = 128  # queries of a block; shorter rows than two of them are attended to whole
OUTPUT = "attention"  # what a backward pass may keep instead of computing it again (jax.ad_checkpoint.checkpoint_name)
_TILE = 128  # of the TPU: splash attention wants lengths and head sizes in multiples of it
MASKED = -1e30


# ---- positions -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a model are stretched to a longer context.

    linear: all by `factor` (Chen et al., 2023). llama3: slow rotations by `factor`, fast ones not at all, and those
    between in proportion; what is slow is said in rotations per `original_length` (Llama 3.1).
    """

    kind: str  # "linear" or "llama3"
    factor: float
    low_frequency: (
        float  # rotations per original_length up to which a frequency counts as slow (llama3 only)
    )
    high_frequency: float  # and above which as fast
    original_length: int  # tokens of the context before it was stretched

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling {self.kind!r} is not supported; linear and llama3 are")
        if not self.factor > 0:
            raise ValueError(f"rope scaling: factor={self.factor} must be above 0")
        if self.kind == "llama3" and not (
            0 < self.low_frequency < self.high_frequency and self.original_length > 0
        ):
            raise ValueError(
                f"rope scaling: low_freq_factor={self.low_frequency} must be below high_freq_factor={self.high_frequency}, "
                f"and both and original_max_position_embeddings={self.original_length} above 0"
            )


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """[H / 2] f32: radians by which each pair of channels turns from one position to the next."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling is None:
        return frequency.astype(np.float32)
    if scaling.kind == "linear":
        return (frequency / scaling.factor).astype(np.float32)
    rotations = scaling.original_length * frequency / (2 * np.pi)
    fast = (rotations - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    fast = np.clip(fast, 0.0, 1.0)  # 0: slow, 1: fast
    return (fast * frequency + (1 - fast) * frequency / scaling.factor).astype(np.float32)


def rope_sin_cos(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Sines and cosines [B, T, 1, H / 2] of positions [B, T]: the same in all layers."""
    angle = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.sin(angle), jnp.cos(angle)


def rope(x: jax.Array, turned: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding, half rotation. x: [B, T, N, H]; turned: from `rotation`."""
    sin, cos = turned
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


# ---- what a query may see --------------------------------------------------------------------------------------------
def document_mask(doc_ids: jax.Array, window: int | None = None) -> jax.Array:
    """[B, T] document ids of packed rows (0 is padding) -> [B, T, T]: causal, within documents and, with a window, no
    further back than `window` tokens, the query itself among them."""
    T = doc_ids.shape[1]
    back = jnp.arange(T)[:, None] - jnp.arange(T)
    near = (back >= 0) if window is None else (back >= 0) & (back < window)
    return (doc_ids[:, :, None] == doc_ids[:, None, :]) & near


# ---- the plain form --------------------------------------------------------------------------------------------------
def attend(q, k, v, mask):
    """Softmax attention. q: [B, T, N, H]; k, v: [B, S, K, H]; mask: [B, T, S] bool. Returns [B, T, N, H].

    Every query must see at least one key.
    """
    B, T, N, H = q.shape
    q = q.reshape(B, T, k.shape[2], -1, H) * (H**-0.5)
    return _attend_own(q, k, v, mask).reshape(B, T, N, H)


def attend_cached(q, k, v, mask, prefix_k=None, prefix_v=None, prefix_mask=None):
    """Softmax attention over [prefix, own] keys of a cache, without copying the prefix to its branches: each part is
    computed by itself, relative to the largest score of both (as in Hydragen, arXiv 2402.05099).

    q: [B, T, N, H]; k: [B, K, H, S]; v: [B, K, S, H]; mask: [B, T, S] bool; prefix_k: [R, K, H, S'] and prefix_v: [R, K, S', H]
    with B = R * P; prefix_mask: broadcasts to [R, P, T, S']. Returns [B, T, N, H]. Every query must see at least one key.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    q = _heads_first(q, K)
    dot = lambda form, *xs: jnp.einsum(form, *xs, preferred_element_type=jnp.float32)  # noqa: E731
    scores = dot("BKTH,BKHS->BKTS", _rows(q), k).reshape(B, K, N // K, T, -1)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    most = scores.max(-1, keepdims=True)
    if prefix_k is not None:
        R, P = prefix_k.shape[0], B // prefix_k.shape[0]
        # The queries of all branches of a prefix as the rows of one product.
        together = q.reshape(R, P, K, -1, H).swapaxes(1, 2).reshape(R, K, -1, H)
        shared = (
            dot("RKTH,RKHS->RKTS", together, prefix_k)
            .reshape(R, K, P, N // K, T, -1)
            .swapaxes(1, 2)
        )
        shared = jnp.where(prefix_mask[:, :, None, None], shared, MASKED)
        most = jnp.maximum(most, shared.max(-1, keepdims=True).reshape(most.shape))
    weights = jnp.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    out = dot("BKTS,BKSH->BKTH", _rows(weights).astype(v.dtype), v).reshape(B, K, N // K, T, H)
    if prefix_k is not None:
        weights = jnp.exp(shared - most.reshape(R, P, K, N // K, T, 1))
        total = total + weights.sum(-1, keepdims=True).reshape(total.shape)
        rows = weights.astype(v.dtype).swapaxes(1, 2).reshape(R, K, P * (N // K) * T, -1)
        more = dot("RKTS,RKSH->RKTH", rows, prefix_v).reshape(R, K, P, N // K, T, H)
        out = out + more.swapaxes(1, 2).reshape(out.shape)
    return _heads_last((out / total).astype(v.dtype))


def _attend_own(q, k, v, mask):
    """q: [B, T, K, G, H], scaled. Heads stand in front before they are multiplied: on a CPU, XLA computes such products, and
    their gradients, up to four times as fast."""
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    B, K, G, T, H = q.shape
    scores = jnp.einsum(
        "BKTH,BKSH->BKTS", q.reshape(B, K, G * T, H), k, preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask[:, None, None], scores.reshape(B, K, G, T, -1), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKTS,BKSH->BKTH", weights.reshape(B, K, G * T, -1), v)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


# ---- the plain form, block by block ----------------------------------------------------------------------------------
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_blocks(q, k, v, doc_ids, window: int | None):
    """Causal attention of whole rows, as `attend` with `document_mask`; a block of queries never sees what comes after it, so
    nearly half of the products are not computed.

    q: [B, T, N, H]; k, v: [B, T, K, H]; doc_ids: [B, T]. Returns [B, T, N, H]. The backward pass is that of Dao et al. (2022,
    Section 3.1): weights come again from the log-sum-exp of the scores, and softmax's share from the output alone.
    """
    return _blocks_forward(q, k, v, doc_ids, window)[0]


def _blocks_forward(q, k, v, doc_ids, window):
    qs, ks, vs = _heads_first(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    outs, sums = [], []
    for at, mask, keys in _blocks(doc_ids, window):
        scores = _block_scores(qs, ks, at, mask, keys)
        most = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(-1, keepdims=True)
        rows = _rows(weights).astype(v.dtype)
        out = jnp.einsum(
            "BKTS,BKSH->BKTH", rows, vs[:, :, keys], preferred_element_type=jnp.float32
        )
        outs.append((out.reshape(*weights.shape[:-1], -1) / total).astype(v.dtype))
        sums.append(most + jnp.log(total))
    out, lse = (checkpoint_name(jnp.concatenate(x, 3), OUTPUT) for x in (outs, sums))
    return _heads_last(out), (q, k, v, doc_ids, out, lse)


def _blocks_backward(window, saved, d_out):
    q, k, v, doc_ids, out, lse = saved
    ks, vs = k.swapaxes(1, 2), v.swapaxes(1, 2)
    qs, d = _heads_first(q, k.shape[2]), _heads_first(d_out, k.shape[2], 1.0)
    share = (d.astype(jnp.float32) * out).sum(-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros(ks.shape, jnp.float32), jnp.zeros(vs.shape, jnp.float32)
    for at, mask, keys in _blocks(doc_ids, window):
        weights = jnp.exp(_block_scores(qs, ks, at, mask, keys) - lse[:, :, :, at])
        d_rows, q_rows = _rows(d[:, :, :, at]), _rows(qs[:, :, :, at])
        d_weights = jnp.einsum(
            "BKTH,BKSH->BKTS", d_rows, vs[:, :, keys], preferred_element_type=jnp.float32
        )
        d_scores = weights * (d_weights.reshape(weights.shape) - share[:, :, :, at])
        rows, weights = _rows(d_scores).astype(q.dtype), _rows(weights).astype(v.dtype)
        one = jnp.einsum("BKTS,BKSH->BKTH", rows, ks[:, :, keys]).reshape(*d_scores.shape[:-1], -1)
        d_q.append(one * (q.shape[-1] ** -0.5))
        d_k = d_k.at[:, :, keys].add(
            jnp.einsum("BKTS,BKTH->BKSH", rows, q_rows, preferred_element_type=jnp.float32)
        )
        d_v = d_v.at[:, :, keys].add(
            jnp.einsum("BKTS,BKTH->BKSH", weights, d_rows, preferred_element_type=jnp.float32)
        )
    back = lambda x, like: x.swapaxes(1, 2).astype(like.dtype)  # noqa: E731
    return _heads_last(jnp.concatenate(d_q, 3)), back(d_k, k), back(d_v, v), None


attend_blocks.defvjp(_blocks_forward, _blocks_backward)


def _blocks(doc_ids, window):
    """(slice of the queries, mask, slice of the keys that they may see) of each block."""
    T = doc_ids.shape[1]
    for a in range(0, T, BLOCK):
        at, first = slice(a, min(a + BLOCK, T)), 0 if window is None else max(0, a - window + 1)
        keys = slice(first, at.stop)
        back = jnp.arange(at.start, at.stop)[:, None] - jnp.arange(first, at.stop)
        near = (back >= 0) if window is None else (back >= 0) & (back < window)
        yield at, (doc_ids[:, at, None] == doc_ids[:, None, keys]) & near, keys


def _block_scores(q, k, at, mask, keys):
    """[B, K, G, t, S] f32. q: [B, K, G, T, H], scaled; k: [B, K, T, H]; mask: [B, t, S]."""
    q = q[:, :, :, at]
    scores = jnp.einsum(
        "BKTH,BKSH->BKTS", _rows(q), k[:, :, keys], preferred_element_type=jnp.float32
    )
    return jnp.where(mask[:, None, None], scores.reshape(*q.shape[:-1], -1), MASKED)


def _heads_first(q, K: int, scale: float | None = None):
    """[B, T, N, H] -> [B, K, G, T, H], scaled by 1 / sqrt(H) if not otherwise."""
    B, T, _, H = q.shape
    q = q.reshape(B, T, K, -1, H) * (H**-0.5 if scale is None else scale)
    return q.transpose(0, 2, 3, 1, 4)


def _heads_last(x):
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _rows(x):
    """[B, K, G, t, ...] -> [B, K, G * t, ...]: the queries of a kv head as the rows of one product."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


# ---- kernels for whole sequences -------------------------------------------------------------------------------------
def choose_kernel(kernel: str, length: int, head_dim: int, dtype: str) -> str:
    """What `kernel` stands for here: itself, or for "auto" the platform's own where its shapes allow it.

    Raises ValueError for a kernel that is asked for by name and cannot do these shapes.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention={kernel!r}: must be one of {', '.join(KERNELS)}")
    tiled = length % _TILE == 0 and head_dim % _TILE == 0
    if kernel == "splash" and not tiled:
        raise ValueError(
            f"attention='splash' needs a length and a head_dim in multiples of {_TILE}; they are {length} and {head_dim}"
        )
    if kernel == "cudnn" and dtype == "float32":
        raise ValueError(
            "attention='cudnn' needs bfloat16 or float16 activations; they are float32"
        )
    here = platform()
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(kernel, here)
    if here != needed:
        raise ValueError(
            f"attention={kernel!r} runs on a {needed.upper()} only; this is a {here.upper()}: take auto or xla"
        )
    if kernel != "auto":
        return kernel
    if here == "tpu" and tiled:
        return "splash"
    small = dtype != "float32" and head_dim % 8 == 0 and head_dim <= 128 and length % 64 == 0
    return "cudnn" if here == "gpu" and small else "xla"


def platform() -> str:
    """Of the devices that a program is traced for: ahead of time, these are not here."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def attend_sequences(q, k, v, doc_ids, window: int | None, kernel: str, interpret: bool = False):
    """Causal attention of whole rows. q: [B, T, N, H]; k, v: [B, T, K, H]; doc_ids: [B, T] int32, or None where every row
    is one document (padding, if any, at its end). Returns [B, T, N, H].

    kernel: as `choose` returned it. interpret: run a Pallas kernel without its hardware, slowly (for tests).
    """
    if kernel == "splash":
        return _splash(q, k, v, doc_ids, window, interpret)
    if kernel == "cudnn":
        return _dot_product(q, k, v, doc_ids, window, "cudnn")
    if doc_ids is None:
        doc_ids = jnp.ones(q.shape[:2], jnp.int32)
    if q.shape[1] >= 2 * BLOCK:
        return attend_blocks(q, k, v, doc_ids, window)
    return attend(q, k, v, document_mask(doc_ids, window))


def _dot_product(q, k, v, doc_ids, window, implementation: str):
    # cuDNN knows causality and windows by themselves; documents need a mask.
    mask = None if doc_ids is None else document_mask(doc_ids, window)[:, None]
    local = None if window is None or mask is not None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=mask is None,
        local_window_size=local,
        implementation=implementation,
    )


def _splash(q, k, v, doc_ids, window, interpret: bool):
    """Over a mesh every device runs the kernel on its own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    run = partial(_splash_local, window=window, interpret=interpret)
    if mesh.empty:
        return run(q, k, v, doc_ids)
    if (
        k.shape[2] % mesh.shape["tensor"]
    ):  # too few kv heads to be split: each query head gets its own
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    heads, rows = PartitionSpec(("data", "fsdp"), None, "tensor"), PartitionSpec(("data", "fsdp"))
    ids = () if doc_ids is None else (doc_ids,)
    local = lambda q, k, v, *ids: run(q, k, v, *(ids or (None,)))  # noqa: E731
    specs = (heads, heads, heads, *(rows for _ in ids))
    # Pallas calls do not say what they vary over, so this is not checked.
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, *ids)


def _splash_local(q, k, v, doc_ids, window, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N = q.shape[1], q.shape[2]
    mask = (
        masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    )
    block = next(b for b in (512, 256, 128) if T % b == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        interpret=interpret,
    )
    heads_first = lambda x: x.swapaxes(1, 2)  # noqa: E731
    q, k, v = heads_first(q) * (q.shape[-1] ** -0.5), heads_first(k), heads_first(v)
    if doc_ids is None:
        return heads_first(jax.vmap(kernel)(q, k, v))
    return heads_first(
        jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids)))(
            q, k, v, doc_ids
        )
    )
