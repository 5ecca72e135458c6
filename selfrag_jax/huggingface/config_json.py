"""Reads and writes Hugging Face's config.json of the Llama family.

Each field is honoured, known not to affect what the model computes, or refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.models.rope import RopeScaling

# Fields that do not affect what the model computes, or only how other programs run or print it.
# tokenizer.py passes on the ids of control tokens.
NEUTRAL = frozenset(
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal _auto_class "
    "_commit_hash _flash_attn_2_enabled _model_name_or_path _name_or_path architectures "
    "attn_implementation bos_token_id chunk_size_feed_forward dtype eos_token_id finetuning_task "
    "gradient_checkpointing id2label initializer_range label2id max_sequence_length "
    "model_max_length output_attentions output_hidden_states output_past pad_token_id "
    "padding_side pretraining_tp problem_type return_dict sep_token_id tokenizer_class "
    "torch_dtype torchscript transformers.js_config transformers_version unk_token_id "
    "use_bfloat16 use_cache use_flash_attention_2 use_return_dict".split()
    # Settings of generation, and of other kinds of models, that early transformers wrote for all.
    + "bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size epsilon_cutoff "
    "eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
    "length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups "
    "num_beams num_return_sequences output_scores penalty_alpha prefix remove_invalid_values "
    "repetition_penalty return_dict_in_generate suppress_tokens task_specific_params temperature "
    "tf_legacy_loss tie_encoder_decoder top_k top_p typical_p".split()
)
_NEUTRAL_PREFIX = "unsloth_"  # how a model was made


@dataclass(frozen=True)
class ConfigFields:
    """What is known about the fields of some model types' config.json."""

    model_types: tuple[str, ...]
    required: tuple[str, ...]  # model_type is, too
    optional: tuple[str, ...]
    fixed: dict[str, Any]  # fields of which only one value is supported
    neutral: frozenset[str]  # fields that do not affect what the model computes


_LLAMA = ConfigFields(
    model_types=("llama", "mistral"),
    required=tuple(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "rms_norm_eps".split()
    ),
    optional=tuple(
        "head_dim max_position_embeddings num_key_value_heads rope_theta rope_scaling "
        "rope_parameters tie_word_embeddings attention_bias mlp_bias sliding_window "
        "use_sliding_window layer_types".split()
    ),
    fixed={
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "is_encoder_decoder": False,
        "partial_rotary_factor": 1.0,
        "pruned_heads": {},
        "add_cross_attention": False,
        "rope_interleaved": False,
    },
    neutral=NEUTRAL | {"is_decoder", "is_llama_config"},  # a Llama decodes in any case
)
_COUNTS = tuple(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings sliding_window".split()
)
_BIASES = ("attention_bias", "mlp_bias")
# Before 4.33, transformers did not write rope_theta: it was a constant.
_EARLY_ROPE_THETA = 10_000.0
# rope_type -> the parameters it needs.
_ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def config_to_json(c: LlamaConfig, ids: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """The content of a model's config.json.

    ids: its bos_token_id, eos_token_id and pad_token_id. Raises UserError for a combination of
    fields that neither Llama nor Mistral supports there.
    """
    is_mistral = c.sliding_window is not None
    if is_mistral and (c.attention_bias or c.mlp_bias):
        raise UserError("Hugging Face's format has no model with both a sliding window and biases")
    row = {
        "architectures": ["MistralForCausalLM" if is_mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if is_mistral else "llama",
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
    if is_mistral:
        return row | {"sliding_window": c.sliding_window}
    return row | {"attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias}


def config_from_json(path: str | Path, dtype: str = "float32") -> LlamaConfig:
    """Reads a config.json. dtype: of activations.

    Raises UserError naming a field that is missing, unknown or unsupported.
    """
    row = read_fields(path, _LLAMA)
    _check_values(path, row)
    heads = row["num_attention_heads"]
    sliding_window = _sliding_window(path, row)
    if row["model_type"] == "mistral":
        for field in _BIASES:
            if row.get(field):
                raise UserError(f"{path}: {field}=true is not supported for model_type 'mistral'")
        if "num_key_value_heads" not in row:
            raise UserError(f"{path}: lacks num_key_value_heads")
    rope_theta, rope_scaling = _rope(path, row)
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
            rope_theta=rope_theta,
            norm_eps=row["rms_norm_eps"],
            tie_embeddings=bool(row.get("tie_word_embeddings")),
            dtype=dtype,
            remat="none",
            scan_unroll=1,
            rope_scaling=rope_scaling,
            attention_bias=bool(row.get("attention_bias")),
            mlp_bias=bool(row.get("mlp_bias")),
            sliding_window=sliding_window,
        )
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None


def read_fields(path: str | Path, known: ConfigFields) -> dict[str, Any]:
    """The fields that affect what the model computes. Raises UserError for an unsupported one."""
    row = read_json(path)
    if not isinstance(row, dict):
        raise UserError(f"{path}: expected the fields of a model, found a {type(row).__name__}")
    row = {
        k: v for k, v in row.items() if k not in known.neutral and not k.startswith(_NEUTRAL_PREFIX)
    }
    required = ("model_type", *known.required)
    # The type first: another type's fields have other names.
    if "model_type" in row and row["model_type"] not in known.model_types:
        raise UserError(
            f"{path}: model_type={row['model_type']!r} is not supported; "
            f"{' and '.join(known.model_types)} {'are' if known.model_types[1:] else 'is'}"
        )
    if missing := [n for n in required if n not in row]:
        raise UserError(f"{path}: lacks {', '.join(missing)}")
    for field, supported in known.fixed.items():
        if row.get(field) not in (None, supported):
            raise UserError(f"{path}: {field}={row[field]!r} is not supported; only {supported!r}")
    for field in sorted(row.keys() - {*required, *known.fixed, *known.optional}):
        if row[field] is not None:  # to transformers, null means that the field is absent
            raise UserError(
                f"{path}: {field}={row[field]!r} is not supported: its effect is not known here"
            )
    for field in required:
        if row[field] is None:
            raise UserError(f"{path}: {field} is null")
    return row


def check_counts(path: str | Path, row: dict[str, Any], fields: Sequence[str]) -> None:
    """Raises UserError for a field that is there and not a whole number above 0."""
    for field in fields:
        if row.get(field) is not None and not (type(row[field]) is int and row[field] > 0):
            raise UserError(f"{path}: {field}={row[field]!r}: must be a whole number above 0")


def _check_values(path: str | Path, row: dict[str, Any]) -> None:
    """Raises UserError for a number, truth value or null where another type is expected."""
    check_counts(path, row, _COUNTS)
    for field in ("rms_norm_eps", "rope_theta"):
        if field in row:
            positive(path, field, row[field])
    for field in (*_BIASES, "tie_word_embeddings"):
        if not isinstance(row.get(field) or False, bool):
            raise UserError(f"{path}: {field}={row[field]!r}: must be true or false")


def positive(path: str | Path, field: str, value: Any) -> float:
    """The number as a float. Raises UserError for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise UserError(f"{path}: {field}={value!r}: must be a number above 0")
    return float(value)


def _sliding_window(path: str | Path, row: dict[str, Any]) -> int | None:
    if row["model_type"] == "mistral" and "sliding_window" not in row:
        raise UserError(f"{path}: lacks sliding_window (null for none)")
    window = row.get("sliding_window")
    if row.get("use_sliding_window") not in (None, window is not None):
        raise UserError(
            f"{path}: use_sliding_window={row['use_sliding_window']!r} contradicts "
            f"sliding_window={window!r}"
        )
    if row["model_type"] == "llama" and window is not None:
        raise UserError(
            f"{path}: sliding_window={window!r} is not supported for model_type 'llama'"
        )
    layer_types, num_layers = row.get("layer_types"), row["num_hidden_layers"]
    supported = "full_attention" if window is None else "sliding_attention"
    if layer_types is not None and layer_types != [supported] * num_layers:
        raise UserError(
            f"{path}: layer_types={layer_types!r} is not supported; all {num_layers} must be "
            f"{supported!r}"
        )
    return window


def _rope(path: str | Path, row: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of the rotary embedding."""
    given = _rope_fields(path, row)
    theta = positive(path, "rope_theta", given.pop("rope_theta", _EARLY_ROPE_THETA))
    kind = given.pop("rope_type", None) or "default"
    if not isinstance(kind, str) or kind not in _ROPE_PARAMETERS:
        supported = ", ".join(_ROPE_PARAMETERS)
        raise UserError(f"{path}: rope_scaling of type {kind!r} is not supported; {supported} are")
    if given.get("partial_rotary_factor", 1.0) == 1.0:
        given.pop("partial_rotary_factor", None)
    needed = _ROPE_PARAMETERS[kind]
    for name in needed:
        if name not in given:
            raise UserError(f"{path}: rope_scaling lacks {name}")
    for name in sorted(given.keys() - set(needed)):
        raise UserError(
            f"{path}: rope_scaling.{name}={given[name]!r} is not supported for type {kind!r}"
        )
    if kind == "default":
        return theta, None
    for name in needed:
        positive(path, f"rope_scaling.{name}", given[name])
    low, high, original = (given.get(n, 0) for n in _ROPE_PARAMETERS["llama3"][1:])
    try:
        scaling = RopeScaling(kind, float(given["factor"]), float(low), float(high), int(original))
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: {e}") from None
    return theta, scaling


def _rope_fields(path: str | Path, row: dict[str, Any]) -> dict[str, Any]:
    """Merges the fields of the rotary embedding. Raises UserError when two of them disagree.

    transformers 5 has all of them in `rope_parameters`; earlier versions in `rope_scaling` and
    `rope_theta`.
    """
    for field in ("rope_scaling", "rope_parameters"):
        if not isinstance(row.get(field) or {}, dict):
            raise UserError(f"{path}: {field}={row[field]!r}: expected an object with a rope_type")
    scaling, parameters = (dict(row.get(f) or {}) for f in ("rope_scaling", "rope_parameters"))
    for fields in (scaling, parameters):
        if "type" in fields:  # the older name
            fields.setdefault("rope_type", fields.pop("type"))
    sources = [scaling, parameters]
    merged = scaling | parameters
    if row.get("rope_theta") is not None:
        sources.append({"rope_theta": row["rope_theta"]})
        merged.setdefault("rope_theta", row["rope_theta"])
    for name, value in merged.items():
        for source in sources:
            # `is not`: NaN does not equal itself.
            if name in source and source[name] is not value and source[name] != value:
                raise UserError(f"{path}: says both {name}={source[name]!r} and {name}={value!r}")
    return merged


def _rope_scaling_to_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    row: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        row["low_freq_factor"] = scaling.low_frequency
        row["high_freq_factor"] = scaling.high_frequency
        row["original_max_position_embeddings"] = scaling.original_length
    return row
