"""BERT-family folders in Hugging Face's format: config.json and the tensors.

One table maps tensors. Hugging Face stores a linear layer as [outputs, inputs], one tensor per
layer; here it is [inputs, outputs], and the layers share one array [L, inputs, outputs].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.huggingface.config_json import (
    NEUTRAL,
    ConfigFields,
    check_counts,
    positive,
    read_fields,
)
from selfrag_jax.huggingface.hub import encoder_conversion_hint
from selfrag_jax.huggingface.weight_files import CONFIG, WeightFiles
from selfrag_jax.models.encoder import BertConfig, Encoder
from selfrag_jax.models.params import Params, flatten, unflatten

# ---- config.json -----------------------------------------------------------------------------
_COUNTS = tuple(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "max_position_embeddings type_vocab_size".split()
)
_FIELDS = ConfigFields(
    model_types=("bert",),
    required=_COUNTS[:-1],
    optional=("hidden_act", "layer_norm_eps", "type_vocab_size"),
    fixed={
        "add_cross_attention": False,
        "is_decoder": False,
        "is_encoder_decoder": False,
        "position_embedding_type": "absolute",
        "pruned_heads": {},
    },
    # Dropout is for training; the pooler, the classifier and tied embeddings are not used.
    neutral=NEUTRAL
    | frozenset(
        "attention_probs_dropout_prob classifier_dropout directionality finetuning_task "
        "hidden_dropout_prob output_past pooler_fc_size pooler_num_attention_heads "
        "pooler_num_fc_layers pooler_size_per_head pooler_type tie_word_embeddings".split()
    ),
)
# hidden_act -> ours
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def bert_config_from_json(path: str | Path, dtype: str = "float32") -> BertConfig:
    """Reads a config.json. dtype: of activations.

    Raises UserError naming a field that is missing, unknown or unsupported.
    """
    row = read_fields(path, _FIELDS)
    check_counts(path, row, _COUNTS)
    activation = row.get("hidden_act") or "gelu"  # here and below: transformers' defaults
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(
            f"{path}: hidden_act={activation!r} is not supported; {', '.join(_ACTIVATIONS)} are"
        )
    eps = row.get("layer_norm_eps")
    try:
        return BertConfig(
            vocab_size=row["vocab_size"],
            embed_dim=row["hidden_size"],
            mlp_dim=row["intermediate_size"],
            num_layers=row["num_hidden_layers"],
            num_heads=row["num_attention_heads"],
            max_length=row["max_position_embeddings"],
            num_types=row.get("type_vocab_size") or 2,
            norm_eps=positive(path, "layer_norm_eps", 1e-12 if eps is None else eps),
            activation=_ACTIVATIONS[activation],
            dtype=dtype,
        )
    except ValueError as e:
        raise UserError(str(e) if isinstance(e, UserError) else f"{path}: {e}") from None


# ---- tensors ---------------------------------------------------------------------------------
def _linear(ours: str, theirs: str) -> dict[tuple[str, ...], str]:
    return {(ours, "kernel"): f"{theirs}.weight", (ours, "bias"): f"{theirs}.bias"}


def _norm(ours: str, theirs: str) -> dict[tuple[str, ...], str]:
    return {(ours, "scale"): f"{theirs}.weight", (ours, "bias"): f"{theirs}.bias"}


# Our path within a layer -> Hugging Face's name within `encoder.layer.{i}.`
LAYER_TABLE: dict[tuple[str, ...], str] = {
    **_linear("q", "attention.self.query"),
    **_linear("k", "attention.self.key"),
    **_linear("v", "attention.self.value"),
    **_linear("o", "attention.output.dense"),
    **_norm("attention_norm", "attention.output.LayerNorm"),
    **_linear("up", "intermediate.dense"),
    **_linear("down", "output.dense"),
    **_norm("mlp_norm", "output.LayerNorm"),
}
# Our path outside the layers -> Hugging Face's name
TOP_TABLE: dict[tuple[str, ...], str] = {
    ("words", "embedding"): "embeddings.word_embeddings.weight",
    ("positions", "embedding"): "embeddings.position_embeddings.weight",
    ("types", "embedding"): "embeddings.token_type_embeddings.weight",
    **_norm("embed_norm", "embeddings.LayerNorm"),
}
_PREFIXES = ("", "bert.")  # of a bare encoder, and of one that was saved with its heads
_HEADS = ("pooler.", "cls.", "classifier.")  # not part of the encoder
_CONSTANTS = ("embeddings.position_ids",)  # stored by early versions
# How TensorFlow names a norm's weight and bias, which early conversions kept.
_EARLY_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def load_bert(folder: str | Path, dtype: str = "float32") -> tuple[Encoder, Params]:
    """Reads an encoder and its parameters (f32, in host memory). dtype: of activations.

    Raises UserError naming the file, field or tensor at fault.
    """
    encoder = Encoder(bert_config_from_json(Path(folder) / CONFIG, dtype))
    files = WeightFiles(folder, encoder_conversion_hint)
    prefix = _prefix(files)
    shapes, used = encoder.shapes(), set()

    def read(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        is_layer = path[0] == "layers"
        out = np.empty(shape, np.float32)
        for i, name in enumerate(_tensor_names(path, encoder.config.num_layers)):
            stored = _stored_name(files, prefix + name)
            used.add(stored)
            part = out[i] if is_layer else out
            if path[-1] == "kernel":
                part[...] = files.tensor(stored, part.shape[::-1]).T
            else:
                part[...] = files.tensor(stored, part.shape)
        return out

    params = unflatten((path, read(path, leaf.shape)) for path, leaf in flatten(shapes))
    for name in sorted(set(files.file_of) - used):
        short = name.removeprefix("bert.")
        if not short.startswith(_HEADS) and short not in _CONSTANTS:
            raise UserError(
                f"{files.folder / files.file_of[name]}: tensor {name!r} has no place in the "
                f"encoder of {CONFIG}"
            )
    return encoder, params


def _tensor_names(path: tuple[str, ...], num_layers: int) -> list[str]:
    """Hugging Face's names of the tensors of one array of ours: one, or one per layer."""
    if path[0] == "layers":
        return [f"encoder.layer.{i}.{LAYER_TABLE[path[1:]]}" for i in range(num_layers)]
    return [TOP_TABLE[path]]


def _prefix(files: WeightFiles) -> str:
    """The prefix of the file's names; the first one if none fits, for the error's sake."""
    table = TOP_TABLE["words", "embedding"]
    return next((p for p in _PREFIXES if p + table in files.file_of), _PREFIXES[0])


def _stored_name(files: WeightFiles, name: str) -> str:
    for now, early in _EARLY_NAMES.items():
        early_name = name.replace(now, early)
        if name not in files.file_of and early_name in files.file_of:
            return early_name
    return name
