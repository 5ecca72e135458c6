"""The cost of a model in FLOPs, and the published peak rates of accelerators."""

from __future__ import annotations

from dataclasses import dataclass

from selfrag_jax.models.encoder import BertConfig
from selfrag_jax.models.llama import LlamaConfig


# ---- accelerators --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, as published by its vendor."""

    name: str
    bf16_flops: float  # per second, dense
    memory: float  # bytes
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second over all links to other chips of its slice or host


# Keys are parts of the device kind that JAX reports, in lower case; the first match counts.
# TPUs: the system architecture pages of cloud.google.com/tpu/docs (2026-11; chip-to-chip links:
# v4 2,400, v5e 1,600, v5p 4,800, v6e 3,584 Gbit/s).
# GPUs: NVIDIA's data sheets, without sparsity; NVLink in one direction.
CHIPS = {
    "tpu v4": Chip("v4", 275e12, 32e9, 1228e9, 2400e9 / 8),
    "tpu v5 lite": Chip("v5e", 197e12, 16e9, 819e9, 1600e9 / 8),
    "tpu v5p": Chip("v5p", 459e12, 95e9, 2765e9, 4800e9 / 8),
    "tpu v5": Chip("v5p", 459e12, 95e9, 2765e9, 4800e9 / 8),
    "tpu v6 lite": Chip("v6e", 918e12, 32e9, 1640e9, 3584e9 / 8),
    "h200": Chip("H200", 989e12, 141e9, 4800e9, 450e9),
    "h100": Chip("H100", 989e12, 80e9, 3350e9, 450e9),
    "a100": Chip("A100", 312e12, 80e9, 2039e9, 300e9),
}
# Variants of these chips with other rates or less memory.
_OTHER_VARIANTS = ("gh200", "pcie", "nvl", "40gb")


def chip(device_kind: str) -> Chip | None:
    """Returns the chip of a JAX device kind, or None if it is not in the table."""
    kind = device_kind.lower()
    if any(variant in kind for variant in _OTHER_VARIANTS):
        return None
    return next((c for part, c in CHIPS.items() if part in kind), None)


# ---- parameters ----------------------------------------------------------------------------------
def num_weights(c: LlamaConfig) -> int:
    """Returns the number of parameters in matrices (norms add a few hundred thousand)."""
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.embed_dim
    return c.num_layers * (num_layer_weights(c) + num_adapter_weights(c)) + tables


def num_layer_weights(c: LlamaConfig) -> int:
    """Returns the weights of one layer, without LoRA."""
    attention = 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim
    return attention + 3 * c.embed_dim * c.mlp_dim


def num_adapter_weights(c: LlamaConfig) -> int:
    """Returns the LoRA weights of one layer."""
    if c.lora is None:
        return 0
    q, kv, D = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.embed_dim
    return c.lora.rank * (2 * (D + q) + 2 * (D + kv) + 3 * (D + c.mlp_dim))


# ---- FLOPs ---------------------------------------------------------------------------------------
def decode_flops_per_token(c: LlamaConfig, context: float) -> float:
    """Returns the FLOPs of reading or generating one token, with attention over `context` keys.

    The output head is left out: its logits are computed for generated tokens only.
    """
    return 2.0 * c.num_layers * (num_layer_weights(c) + 2 * c.num_heads * c.head_dim * context)


def train_flops_per_token(c: LlamaConfig, length: int, targets: float = 1.0) -> float:
    """Returns the model FLOPs of training on one token, forward and backward.

    By maxtext's convention: 6 per weight that is multiplied (the embedding is a lookup, so only the
    output head counts), and 12 * L * N * H per visible pair of query and key (6 * L * N * H * T
    without a window). What remat recomputes does not count. Frozen weights under LoRA cost 4,
    because they get no gradient.

    targets: the share of tokens whose logits are computed.
    """
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * _mean_visible_keys(c, length)
    head = targets * c.vocab_size * c.embed_dim
    if c.lora is None:
        return 6.0 * (head + c.num_layers * num_layer_weights(c)) + attention
    frozen = c.num_layers * num_layer_weights(c)
    return 6.0 * (head + c.num_layers * num_adapter_weights(c)) + 4.0 * frozen + attention


def encoder_flops_per_token(c: BertConfig, length: int) -> float:
    """Returns the FLOPs of embedding one token of a row of `length` tokens.

    2 per weight of a layer's matrices, 4 * D^2 + 2 * D * F weights, and 4 * D per key for
    attention, which sees the whole row. Embeddings are lookups; pooling is left out.
    """
    D = c.embed_dim
    weights = 4 * D * D + 2 * D * c.mlp_dim
    return float(c.num_layers * (2 * weights + 4 * D * length))


def recomputed_flops_per_token(c: LlamaConfig, length: int, loss_chunk: bool) -> float:
    """Returns the FLOPs per token that the backward pass recomputes.

    remat="full" recomputes each layer's forward pass, "dots" only its attention. A loss that is
    computed in chunks recomputes the logits.
    """
    attention = 4 * c.num_layers * c.num_heads * c.head_dim * _mean_visible_keys(c, length)
    layers = 2 * c.num_layers * (num_layer_weights(c) + num_adapter_weights(c))
    recomputed = {"none": 0, "dots": attention, "full": attention + layers}[c.remat]
    return float(recomputed + (2 * c.vocab_size * c.embed_dim if loss_chunk else 0))


def _mean_visible_keys(c: LlamaConfig, length: int) -> float:
    """Returns the keys that a token sees on average: half of the row, or most of a short window."""
    window = min(length, c.sliding_window or length)
    return window * (1 - window / (2 * length))
