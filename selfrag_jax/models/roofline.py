"""What a model costs and what a chip can do: model FLOPs, and the public peak rates of accelerators."""

from __future__ import annotations

from dataclasses import dataclass

from selfrag_jax.models.llama import LlamaConfig


@dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, as its maker states them."""

    name: str
    bf16_flops: float  # per second, dense
    memory: float  # bytes
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second over all links to other chips of its slice or host


# By a part of the device kind that JAX reports, in lower case. TPUs: the system architecture pages of cloud.google.com/tpu/docs
# (2026-11; between chips v4 2,400, v5e 1,600, v5p 4,800, v6e 3,584 Gbit/s). GPUs: NVIDIA's data sheets, without sparsity; NVLink one way.
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
# Cards of those names with other rates or less memory.
_OTHERS = ("gh200", "pcie", "nvl", "40gb")


def chip(device_kind: str) -> Chip | None:
    """The chip of a JAX device kind, or None for one that is not in the table."""
    kind = device_kind.lower()
    return next(
        (c for part, c in CHIPS.items() if part in kind and not any(o in kind for o in _OTHERS)),
        None,
    )


def _layer_weights(c: LlamaConfig) -> int:
    return (
        2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.embed_dim * c.mlp_dim
    )


def _adapter_weights(c: LlamaConfig) -> int:
    """Of one layer."""
    q, kv, D = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.embed_dim
    return c.lora.rank * (2 * (D + q) + 2 * (D + kv) + 3 * (D + c.mlp_dim))


def weights(c: LlamaConfig) -> int:
    """Parameters in matrices (the norms are some hundred thousand more)."""
    adapters = _adapter_weights(c) if c.lora else 0
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.embed_dim
    return c.num_layers * (_layer_weights(c) + adapters) + tables


def decode_flops_per_token(c: LlamaConfig, context: float) -> float:
    """Floating-point operations for a token that is read or generated, of the products with weights (without the output head,
    whose logits are needed at generated tokens only) and of attention over `context` keys."""
    return 2.0 * c.num_layers * (_layer_weights(c) + 2 * c.num_heads * c.head_dim * context)


def _seen(c: LlamaConfig, length: int) -> float:
    """Keys that a token of a row sees on average: half of the row, or nearly all of a short window."""
    window = min(length, c.sliding_window or length)
    return window * (1 - window / (2 * length))


def train_flops_per_token(c: LlamaConfig, length: int, targets: float = 1.0) -> float:
    """Floating-point operations of the model for one token of training, forward and backward (maxtext's convention).

    6 for every weight that multiplies (the embedding is looked up, so only the output head counts), and causal attention,
    of which half is computed: 6 * L * N * H * T (12 * L * N * H for each pair of tokens, see `_seen`). What remat computes again does not
    count. With LoRA the gradients of the frozen weights are not computed: 4 for each of those. targets: the share of tokens of
    which logits are computed.
    """
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * _seen(c, length)
    learned = targets * c.vocab_size * c.embed_dim + c.num_layers * (
        _adapter_weights(c) if c.lora else _layer_weights(c)
    )
    return 6.0 * learned + (4.0 * c.num_layers * _layer_weights(c) if c.lora else 0.0) + attention


def recomputed_flops_per_token(c: LlamaConfig, length: int, loss_chunk: bool) -> float:
    """What the backward pass computes again, beside the model's own: a layer's forward pass with remat="full", its attention
    with "dots", and the logits when the loss is computed in chunks."""
    attention = 4 * c.num_layers * c.num_heads * c.head_dim * _seen(c, length)
    layers = 2 * c.num_layers * (_layer_weights(c) + (_adapter_weights(c) if c.lora else 0))
    again = {"none": 0, "dots": attention, "full": attention + layers}[c.remat]
    return float(again + (2 * c.vocab_size * c.embed_dim if loss_chunk else 0))
