"""The architecture of a GGUF file of the Llama family, from its metadata.

Each field of the architecture is honoured, known not to affect what the model computes, or refused
by name. Mistral models are of the family `llama` here, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.gguf_files.header import GgufHeader, read_header
from selfrag_jax.gguf_files.weights import ROPE_FACTORS, read_values
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.models.rope import RopeScaling, rope_frequencies

FAMILY = "llama"
_COUNTS = (
    "context_length embedding_length block_count feed_forward_length attention.head_count".split()
)
_REQUIRED = (*_COUNTS, "attention.layer_norm_rms_epsilon")
_OPTIONAL = (
    "attention.head_count_kv attention.key_length attention.value_length rope.dimension_count "
    "rope.freq_base rope.scaling.type rope.scaling.factor vocab_size".split()
)
# Fields of which only one value is supported.
_FIXED = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "tensor_data_layout": "Meta AI original pth",  # llama.cpp's order of rows; see weights.py
}
# How other programs run the model, or what was said of it before it was converted.
_NEUTRAL = ("rope.scaling.original_context_length", "rope.scaling.finetuned")
_DEFAULT_THETA = 10_000.0  # of llama.cpp, where the file has no rope.freq_base
# What every published Llama 3.1, 3.2 and 3.3 has; the file has their effect alone.
_LLAMA3_FREQUENCIES, _LLAMA3_LENGTH = (1.0, 4.0), 8192


def open_llama(path: str | Path) -> GgufHeader:
    """The header of a GGUF file of the Llama family.

    Raises UserError naming the family of any other, and as `read_header` does.
    """
    header = read_header(path)
    family = header.fields.get("general.architecture")
    if family != FAMILY:
        raise UserError(
            f"{path}: general.architecture={family!r} is not supported; {FAMILY!r} is (Llama, "
            "Mistral and their relatives)"
        )
    return header


def read_config(path: str | Path, dtype: str = "float32") -> LlamaConfig:
    """The architecture of a GGUF file. dtype: of activations.

    Raises UserError naming a field that is missing, unknown or unsupported.
    """
    header = open_llama(path)
    row = _family_fields(header)
    for field in (*_COUNTS, *(f for f in _OPTIONAL if f.endswith(("_length", "count", "_kv")))):
        row[field] = _count(header, field, row.get(field))
    heads, embed_dim = row["attention.head_count"], row["embedding_length"]
    head_dim = row["attention.key_length"] or embed_dim // heads
    for field in ("attention.value_length", "rope.dimension_count"):
        if row[field] not in (None, head_dim):
            raise _refused(header, field, row[field], f"only the head's size, {head_dim}")
    theta = _positive(header, "rope.freq_base", row.get("rope.freq_base", _DEFAULT_THETA))
    try:
        return LlamaConfig(
            vocab_size=_vocabulary_rows(header, row.get("vocab_size")),
            embed_dim=embed_dim,
            mlp_dim=row["feed_forward_length"],
            num_layers=row["block_count"],
            num_heads=heads,
            num_kv_heads=row["attention.head_count_kv"] or heads,
            head_dim=head_dim,
            max_length=row["context_length"],
            rope_theta=theta,
            norm_eps=_positive(header, _REQUIRED[-1], row[_REQUIRED[-1]]),
            tie_embeddings="output.weight" not in header.tensors,
            dtype=dtype,
            remat="none",
            scan_unroll=1,
            rope_scaling=_rope_scaling(header, row, head_dim, theta),
            attention_bias="blk.0.attn_q.bias" in header.tensors,
            mlp_bias="blk.0.ffn_up.bias" in header.tensors,
        )
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None


def _family_fields(header: GgufHeader) -> dict[str, Any]:
    """The fields of the architecture, without the family's name in front of theirs."""
    prefix = f"{FAMILY}."
    row = {k.removeprefix(prefix): v for k, v in header.fields.items() if k.startswith(prefix)}
    if missing := [field for field in _REQUIRED if field not in row]:
        raise UserError(f"{header.path}: lacks {prefix}{missing[0]}")
    for field, supported in _FIXED.items():
        if row.get(field, supported) != supported:
            raise _refused(header, field, row[field], f"only {supported!r}")
    for field in sorted(row.keys() - {*_REQUIRED, *_OPTIONAL, *_FIXED, *_NEUTRAL}):
        raise _refused(header, field, row[field], "its effect is not known here")
    return row


def _refused(header: GgufHeader, field: str, value: Any, why: str) -> UserError:
    return UserError(f"{header.path}: {FAMILY}.{field}={value!r} is not supported: {why}")


def _count(header: GgufHeader, field: str, value: Any) -> int | None:
    """A whole number above 0, or None. A list has one for each layer: they have to be the same."""
    if isinstance(value, list) and value:
        if any(v != value[0] for v in value):
            raise _refused(header, field, value, "layers of different sizes")
        value = value[0]
    if value is not None and not (type(value) is int and value > 0):
        raise UserError(
            f"{header.path}: {FAMILY}.{field}={value!r}: must be a whole number above 0"
        )
    return value


def _positive(header: GgufHeader, field: str, value: Any) -> float:
    """The number as the shortest decimal of the same f32: 1e-05, not 9.999999747378752e-06."""
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise UserError(f"{header.path}: {FAMILY}.{field}={value!r}: must be a number above 0")
    return float(str(np.float32(value)))


def _vocabulary_rows(header: GgufHeader, stated: int | None) -> int:
    """The rows of the embedding. Raises UserError if there is none, or if vocab_size is another."""
    if "token_embd.weight" not in header.tensors:
        raise UserError(f"{header.path}: tensor 'token_embd.weight' is missing")
    rows = header.tensors["token_embd.weight"].rows
    if stated not in (None, rows):
        raise UserError(
            f"{header.path}: {FAMILY}.vocab_size={stated}, but 'token_embd.weight' has {rows} rows"
        )
    return rows


# ---- the rotary embedding ------------------------------------------------------------------------
def _rope_scaling(
    header: GgufHeader, row: dict[str, Any], head_dim: int, theta: float
) -> RopeScaling | None:
    # As llama.cpp does: a factor alone is linear, and none is 1.
    kind, factor = row.get("rope.scaling.type", "linear"), row.get("rope.scaling.factor") or 1.0
    if kind not in ("none", "linear"):
        raise _refused(header, "rope.scaling.type", kind, "only 'none' and 'linear'")
    is_scaled = kind == "linear" and factor != 1.0
    if ROPE_FACTORS in header.tensors:
        if is_scaled:
            raise _refused(header, "rope.scaling.factor", factor, f"there is {ROPE_FACTORS!r}, too")
        return _llama3_scaling(header, head_dim, theta)
    if not is_scaled:
        return None
    return RopeScaling("linear", _positive(header, "rope.scaling.factor", factor), 0.0, 0.0, 0)


def _llama3_scaling(header: GgufHeader, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama 3.1's scaling. Its file has what each frequency is divided by, not the settings.

    Raises UserError if the divisors are not those of Llama 3.1 with any factor.
    """
    entry = header.tensors[ROPE_FACTORS]
    divisors = read_values(header.path, entry).astype(np.float32)
    found = None
    if divisors.shape == (head_dim // 2,) and np.isfinite(divisors).all() and (divisors > 0).all():
        found = RopeScaling("llama3", float(divisors.max()), *_LLAMA3_FREQUENCIES, _LLAMA3_LENGTH)
        plain, scaled = (rope_frequencies(head_dim, theta, s) for s in (None, found))
        if np.allclose(plain / scaled, divisors, rtol=1e-4):
            return found
    raise UserError(
        f"{header.path}: {ROPE_FACTORS!r} scales the rotary embedding in a way that is not "
        "supported; Llama 3.1's is (low_freq_factor 1, high_freq_factor 4, 8192 positions)"
    )
