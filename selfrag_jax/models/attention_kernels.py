"""Attention over whole sequences (training, no cache) with the fastest kernel of the platform.

xla      plain XLA operations, everywhere; the reference. Long rows are computed blockwise
splash   JAX's Pallas kernel for TPUs: never holds the [T, T] scores
cudnn    cuDNN's flash attention through jax.nn.dot_product_attention, on NVIDIA GPUs
auto     splash on TPUs and cudnn on GPUs where the shapes allow it, else xla
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from selfrag_jax.models.attention import (
    BLOCK_SIZE,
    blockwise_attention,
    dense_attention,
    document_mask,
)
from selfrag_jax.models.sharding import BATCH, platform

KERNELS = ("auto", "xla", "splash", "cudnn")
_TPU_TILE = 128  # splash attention needs lengths and head sizes in multiples of it


def choose_kernel(kernel: str, length: int, head_dim: int, dtype: str) -> str:
    """Returns the kernel to run; "auto" becomes the platform's fastest for these shapes.

    Raises ValueError if the named kernel cannot run here or does not support these shapes.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention={kernel!r}: must be one of {', '.join(KERNELS)}")
    tiled = length % _TPU_TILE == 0 and head_dim % _TPU_TILE == 0
    if kernel == "splash" and not tiled:
        raise ValueError(
            f"attention='splash' needs a length and a head_dim in multiples of {_TPU_TILE}; "
            f"they are {length} and {head_dim}"
        )
    if kernel == "cudnn" and dtype == "float32":
        raise ValueError(
            "attention='cudnn' needs bfloat16 or float16 activations; they are float32"
        )
    here = platform()
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(kernel, here)
    if here != needed:
        raise ValueError(
            f"attention={kernel!r} runs on a {needed.upper()} only; this is a {here.upper()}: "
            "use auto or xla"
        )
    if kernel != "auto":
        return kernel
    if here == "tpu" and tiled:
        return "splash"
    cudnn_can = dtype != "float32" and head_dim % 8 == 0 and head_dim <= 128 and length % 64 == 0
    return "cudnn" if here == "gpu" and cudnn_can else "xla"


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    doc_ids: Int[Array, "B T"] | None,
    window: int | None,
    kernel: str,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal self-attention of whole rows.

    doc_ids: None if every row is one document, with its padding (if any) at the end.
    kernel: as returned by `choose_kernel`. interpret: emulate a Pallas kernel, slowly (for tests).
    """
    if kernel == "splash":
        return _splash_attention(q, k, v, doc_ids, window, interpret)
    if kernel == "cudnn":
        return _jax_nn_attention(q, k, v, doc_ids, window, "cudnn")
    if doc_ids is None:
        doc_ids = jnp.ones(q.shape[:2], jnp.int32)
    if q.shape[1] >= 2 * BLOCK_SIZE:
        return blockwise_attention(q, k, v, doc_ids, window)
    return dense_attention(q, k, v, document_mask(doc_ids, window))


def _jax_nn_attention(q, k, v, doc_ids, window, implementation: Literal["xla", "cudnn"]):
    # cuDNN supports causality and windows natively; documents need an explicit mask.
    mask = None if doc_ids is None else document_mask(doc_ids, window)[:, None]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=mask is None,
        local_window_size=None if window is None or mask is not None else (window - 1, 0),
        implementation=implementation,
    )


def _splash_attention(q, k, v, doc_ids, window, interpret: bool):
    """On a mesh, each device runs the kernel on its own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    run = partial(_splash_on_device, window=window, interpret=interpret)
    if mesh.empty:
        return run(q, k, v, doc_ids)
    if k.shape[2] % mesh.shape["tensor"]:  # too few kv heads to split: repeat them
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    heads = PartitionSpec(("data", "fsdp"), None, "tensor")

    # check_vma=False: Pallas calls do not declare which mesh axes their outputs vary over.
    def shard(*specs):
        return jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)

    if doc_ids is None:
        return shard(heads, heads, heads)(q, k, v)
    return shard(heads, heads, heads, BATCH)(q, k, v, doc_ids)


def _splash_on_device(q, k, v, doc_ids=None, *, window, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N = q.shape[1], q.shape[2]
    shape = (T, T)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(b for b in (512, 256, 128) if T % b == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        interpret=interpret,
    )

    def attend_row(q, k, v, ids):
        return kernel(q, k, v, kernels.SegmentIds(ids, ids))

    def swap_heads(x):
        return x.swapaxes(1, 2)

    q, k, v = swap_heads(q) * (q.shape[-1] ** -0.5), swap_heads(k), swap_heads(v)
    if doc_ids is None:
        return swap_heads(jax.vmap(kernel)(q, k, v))
    return swap_heads(jax.vmap(attend_row)(q, k, v, doc_ids))
