"""Shapes of published Llama-family models, for compiling and measuring without their weights."""

from __future__ import annotations

from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.models.rope import RopeScaling

_LLAMA2 = dict(vocab_size=32_000, head_dim=128, max_length=4096, rope_theta=10_000.0, norm_eps=1e-5)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama2_7b": dict(
        _LLAMA2, embed_dim=4096, mlp_dim=11_008, num_layers=32, num_heads=32, num_kv_heads=32,
    ),
    "llama2_13b": dict(
        _LLAMA2, embed_dim=5120, mlp_dim=13_824, num_layers=40, num_heads=40, num_kv_heads=40,
    ),
    "llama2_70b": dict(
        _LLAMA2, embed_dim=8192, mlp_dim=28_672, num_layers=80, num_heads=64, num_kv_heads=8,
    ),
    "llama31_8b": dict(
        vocab_size=128_256, max_length=131_072, embed_dim=4096, mlp_dim=14_336,
        num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, norm_eps=1e-5,
        rope_theta=500_000.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    ),
    "mistral_7b": dict(
        vocab_size=32_000, max_length=32_768, embed_dim=4096, mlp_dim=14_336,
        num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, norm_eps=1e-5,
        rope_theta=10_000.0, sliding_window=4096,
    ),
}  # fmt: skip


def architecture(name: str, extra_tokens: int, dtype: str) -> LlamaConfig:
    """Returns a named architecture, its vocabulary extended by `extra_tokens`.

    Raises UserError for an unknown name.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"architecture={name!r}: must be one of {', '.join(ARCHITECTURES)}")
    fields = dict(ARCHITECTURES[name])
    fields["vocab_size"] += extra_tokens
    return LlamaConfig(**fields, tie_embeddings=False, dtype=dtype, remat="none", scan_unroll=1)
