"""Weights in and out of Hugging Face's Llama format, by one table.

Hugging Face stores a linear layer as [outputs, inputs], one tensor per layer; here it is [inputs, outputs] and the
layers of a stack share one array [L, inputs, outputs]. Both rotate halves in the rotary embedding, so no permutation.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax.models.llama import LlamaConfig, Params
from selfrag_jax.records import BadInput, read_json, write_json

# our path within a layer -> Hugging Face's name within `model.layers.{i}.`
LAYER_TABLE: dict[tuple[str, str], str] = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("q", "kernel"): "self_attn.q_proj.weight",
    ("k", "kernel"): "self_attn.k_proj.weight",
    ("v", "kernel"): "self_attn.v_proj.weight",
    ("o", "kernel"): "self_attn.o_proj.weight",
    ("gate", "kernel"): "mlp.gate_proj.weight",
    ("up", "kernel"): "mlp.up_proj.weight",
    ("down", "kernel"): "mlp.down_proj.weight",
}
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def config_to_json(c: LlamaConfig, bos: int, eos: int, pad: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_length,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": "float32",
    }


def config_from_json(path: str | Path, dtype: str = "float32") -> LlamaConfig:
    """Reads a `config.json`. Raises BadInput naming a field that is missing or that this model cannot honour."""
    row = read_json(path)
    for field, wanted in (("model_type", "llama"), ("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if row.get(field, wanted) != wanted:
            raise BadInput(f"{path}: {field}={row[field]!r} is not supported; only {wanted!r}")
    if row.get("rope_scaling"):
        raise BadInput(f"{path}: rope_scaling={row['rope_scaling']!r} is not supported")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    if missing := [n for n in names if n not in row]:
        raise BadInput(f"{path}: lacks {', '.join(missing)}")
    heads = row["num_attention_heads"]
    theta = row.get("rope_theta") or (row.get("rope_parameters") or {}).get("rope_theta")
    if theta is None:
        raise BadInput(f"{path}: lacks rope_theta (or rope_parameters.rope_theta)")
    return LlamaConfig(
        vocab_size=row["vocab_size"],
        embed_dim=row["hidden_size"],
        mlp_dim=row["intermediate_size"],
        num_layers=row["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=row.get("num_key_value_heads") or heads,
        head_dim=row.get("head_dim") or row["hidden_size"] // heads,
        max_length=row.get("max_position_embeddings", 2048),
        rope_theta=float(theta),
        norm_eps=row["rms_norm_eps"],
        tie_embeddings=row.get("tie_word_embeddings", False),
        dtype=dtype,
        remat=False,
        scan_unroll=1,
    )


def to_tensors(params: Params) -> dict[str, np.ndarray]:
    """Parameters under Hugging Face's names."""
    out = {"model.embed_tokens.weight": params["embed"]["embedding"], "model.norm.weight": params["norm"]["scale"]}
    if "head" in params:
        out["lm_head.weight"] = np.asarray(params["head"]["kernel"]).T
    for (module, leaf), name in LAYER_TABLE.items():
        stacked = np.asarray(params["layers"][module][leaf])
        for i, layer in enumerate(stacked):
            out[f"model.layers.{i}.{name}"] = layer.T if layer.ndim == 2 else layer
    return {k: np.ascontiguousarray(np.asarray(v)) for k, v in out.items()}


def from_tensors(c: LlamaConfig, tensors: dict[str, np.ndarray], source: str) -> Params:
    """The inverse of `to_tensors`. Raises BadInput naming a missing tensor or one with NaN or infinite values."""

    def take(name: str) -> np.ndarray:
        if name not in tensors:
            raise BadInput(f"{source}: tensor {name!r} is missing")
        value = np.asarray(tensors[name], np.float32)
        if not np.isfinite(value).all():
            raise BadInput(f"{source}: tensor {name!r} holds NaN or infinite values")
        return value

    params: Params = {"embed": {"embedding": take("model.embed_tokens.weight")}, "norm": {"scale": take("model.norm.weight")}}
    params["layers"] = {}
    for (module, leaf), name in LAYER_TABLE.items():
        layers = [take(f"model.layers.{i}.{name}") for i in range(c.num_layers)]
        params["layers"].setdefault(module, {})[leaf] = np.stack([x.T if x.ndim == 2 else x for x in layers])
    if not c.tie_embeddings:
        params["head"] = {"kernel": take("lm_head.weight").T}
    return params


def save(folder: str | Path, c: LlamaConfig, params: Params, tokenizer) -> None:
    """Writes config.json, model.safetensors and the tokenizer: a folder that `transformers` loads as a Llama."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(to_tensors(params), temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS)
    tokenizer.save(folder)
    write_json(folder / CONFIG, config_to_json(c, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes files that only their owner can read


def load(folder: str | Path) -> tuple[LlamaConfig, Params]:
    """Reads config.json and model.safetensors. Raises BadInput naming the file at fault."""
    import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise BadInput(f"{folder / WEIGHTS}: no such file")
    c = config_from_json(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as e:
        raise BadInput(f"{folder / WEIGHTS}: not readable as safetensors ({e}); is it truncated?") from None
    return c, from_tensors(c, tensors, str(folder / WEIGHTS))
