"""Hugging Face's config.json of the Llama family, there and back: every field is honoured, says nothing about the function that
the model computes, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json
from selfrag_jax.models.attention import RopeScaling
from selfrag_jax.models.llama import LlamaConfig

# Fields that say nothing about the function that the model computes, or only how transformers runs or prints it.
_NEUTRAL = frozenset(
    "_attn_implementation_autoset _name_or_path architectures bos_token_id chunk_size_feed_forward dtype eos_token_id "
    "gradient_checkpointing id2label initializer_range label2id max_length max_sequence_length output_attentions "
    "output_hidden_states pad_token_id pretraining_tp problem_type return_dict torch_dtype transformers_version unk_token_id "
    "use_cache".split()
)  # the ids of control tokens are passed on by tokenizer.py
# Fields of which one value alone can be honoured.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
}
_REQUIRED = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "rms_norm_eps")  # fmt: skip
_READ = frozenset(
    "head_dim max_position_embeddings num_key_value_heads rope_theta rope_scaling rope_parameters tie_word_embeddings "
    "attention_bias mlp_bias sliding_window use_sliding_window layer_types".split()
)
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "sliding_window",
)  # fmt: skip
_EARLY_ROPE_THETA = (
    10_000.0  # Llama folders written before transformers 4.33 do not say it: it was a constant
)


def config_to_json(c: LlamaConfig, ids: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a model. ids: its bos_token_id, eos_token_id and pad_token_id. Raises BadInput for a combination that
    neither Llama nor Mistral has there."""
    if c.sliding_window is not None and (c.attention_bias or c.mlp_bias):
        raise UserError("Hugging Face's format has no model with both a sliding window and biases")
    mistral = c.sliding_window is not None
    row = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_length,
        "rope_theta": c.rope_theta,
        "rope_scaling": _rope_scaling_to_json(c.rope_scaling),
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    } | ids
    more = (
        {"sliding_window": c.sliding_window}
        if mistral
        else {"attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias}
    )
    return row | more


def config_from_json(path: str | Path, dtype: str = "float32") -> LlamaConfig:
    """Reads a `config.json`; dtype: of activations.

    Every field is honoured or known to change nothing; BadInput names one that is missing, unknown or unsupported.
    """
    row = read_json(path)
    if not isinstance(row, dict):
        raise UserError(f"{path}: expected the fields of a model, found a {type(row).__name__}")
    row = {k: v for k, v in row.items() if k not in _NEUTRAL}
    if missing := [n for n in _REQUIRED if n not in row]:
        raise UserError(f"{path}: lacks {', '.join(missing)}")
    kind = row["model_type"]
    if kind not in ("llama", "mistral"):
        raise UserError(f"{path}: model_type={kind!r} is not supported; llama and mistral are")
    for field, wanted in _FIXED.items():
        if row.get(field) not in (None, wanted):
            raise UserError(f"{path}: {field}={row[field]!r} is not supported; only {wanted!r}")
    unknown = {*row} - {*_REQUIRED, *_FIXED, *_READ}
    if unknown := sorted(
        name for name in unknown if row[name] is not None
    ):  # null is what transformers takes for "not there"
        raise UserError(
            f"{path}: {unknown[0]}={row[unknown[0]]!r} is not supported: what it changes is not known here"
        )
    for field in _COUNTS:
        if row.get(field) is not None and not (type(row[field]) is int and row[field] > 0):
            raise UserError(f"{path}: {field}={row[field]!r}: must be a whole number above 0")
    for field in ("rms_norm_eps", "rope_theta"):
        if field in row:
            _positive(path, field, row[field])
    for field in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if not isinstance(row.get(field) or False, bool):
            raise UserError(f"{path}: {field}={row[field]!r}: must be true or false")
    if nulls := [n for n in _REQUIRED if row[n] is None]:
        raise UserError(f"{path}: {nulls[0]} is null")
    window = _sliding_window(path, row, kind)
    for field in ("attention_bias", "mlp_bias"):
        if kind == "mistral" and row.get(field):
            raise UserError(f"{path}: {field}=true is not supported for model_type 'mistral'")
    heads = row["num_attention_heads"]
    if kind == "mistral" and "num_key_value_heads" not in row:
        raise UserError(f"{path}: lacks num_key_value_heads")
    theta, scaling = _rope(path, row)
    try:
        return LlamaConfig(
            vocab_size=row["vocab_size"],
            embed_dim=row["hidden_size"],
            mlp_dim=row["intermediate_size"],
            num_layers=row["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=row.get("num_key_value_heads") or heads,
            head_dim=row.get("head_dim") or row["hidden_size"] // heads,
            max_length=row.get("max_position_embeddings") or 2048,
            rope_theta=theta,
            norm_eps=row["rms_norm_eps"],
            tie_embeddings=bool(row.get("tie_word_embeddings")),
            dtype=dtype,
            remat="none",
            scan_unroll=1,
            rope_scaling=scaling,
            attention_bias=bool(row.get("attention_bias")),
            mlp_bias=bool(row.get("mlp_bias")),
            sliding_window=window,
        )
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None


def _positive(path, field: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 < value < float("inf")
    ):
        raise UserError(f"{path}: {field}={value!r}: must be a number above 0")
    return float(value)


def _sliding_window(path, row: dict[str, Any], kind: str) -> int | None:
    if kind == "mistral" and "sliding_window" not in row:
        raise UserError(f"{path}: lacks sliding_window (null for none)")
    window = row.get("sliding_window")
    if row.get("use_sliding_window") not in (None, window is not None):
        raise UserError(
            f"{path}: use_sliding_window={row['use_sliding_window']!r} contradicts sliding_window={window!r}"
        )
    if kind == "llama" and window is not None:
        raise UserError(
            f"{path}: sliding_window={window!r} is not supported for model_type 'llama'"
        )
    wanted = "full_attention" if window is None else "sliding_attention"
    types = row.get("layer_types")
    if types is not None and types != [wanted] * row["num_hidden_layers"]:
        raise UserError(
            f"{path}: layer_types={types!r} is not supported; all {row['num_hidden_layers']} must be {wanted!r}"
        )
    return window


def _rope(path, row: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, which transformers 5 keeps in `rope_parameters` and earlier ones in two fields."""
    for field in ("rope_scaling", "rope_parameters"):
        if not isinstance(row.get(field) or {}, dict):
            raise UserError(f"{path}: {field}={row[field]!r}: expected an object with a rope_type")
    forms = [dict(row.get(field) or {}) for field in ("rope_scaling", "rope_parameters")]
    for form in forms:
        if "type" in form:  # the older name
            form.setdefault("rope_type", form.pop("type"))
    given = forms[0] | forms[1]
    if row.get("rope_theta") is not None:
        forms.append({"rope_theta": row["rope_theta"]})
        given.setdefault("rope_theta", row["rope_theta"])
    for name, value in given.items():
        if other := [
            f[name] for f in forms if name in f and f[name] is not value and f[name] != value
        ]:
            raise UserError(f"{path}: says both {name}={other[0]!r} and {name}={value!r}")
    theta = _positive(path, "rope_theta", given.pop("rope_theta", _EARLY_ROPE_THETA))
    kind = given.pop("rope_type", None) or "default"
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if not isinstance(kind, str) or kind not in names:
        raise UserError(
            f"{path}: rope_scaling of type {kind!r} is not supported; {', '.join(names)} are"
        )
    if given.get("partial_rotary_factor", 1.0) == 1.0:
        given.pop("partial_rotary_factor", None)
    for name in names[kind]:
        if name not in given:
            raise UserError(f"{path}: rope_scaling lacks {name}")
    if unknown := sorted(set(given) - set(names[kind])):
        raise UserError(
            f"{path}: rope_scaling.{unknown[0]}={given[unknown[0]]!r} is not supported for type {kind!r}"
        )
    if kind == "default":
        return theta, None
    for name in names[kind]:
        _positive(path, f"rope_scaling.{name}", given[name])
    low, high, original = (given.get(n, 0) for n in names["llama3"][1:])
    try:
        return theta, RopeScaling(
            kind, float(given["factor"]), float(low), float(high), int(original)
        )
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: {e}") from None


def _rope_scaling_to_json(s: RopeScaling | None) -> dict[str, Any] | None:
    if s is None:
        return None
    row: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind == "llama3":
        row |= {"low_freq_factor": s.low_frequency, "high_freq_factor": s.high_frequency}
        row |= {"original_max_position_embeddings": s.original_length}
    return row
