"""Llama-family models in Hugging Face's format: which tensors they have, and how they are written.

One table maps tensors. Hugging Face stores a linear layer as [outputs, inputs], one tensor per
layer; here it is [inputs, outputs], and the layers of a stack share one array [L, inputs, outputs].
Both rotate halves in the rotary embedding, so nothing is permuted.

A GGUF file (gguf_files/) is read by the same table.

Tensors are read one at a time (weight_files.py) and written one shard at a time
(`write_tensors`), so a model that is converted need not fit in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.files import write_json
from selfrag_jax.gguf_files import architecture
from selfrag_jax.gguf_files.header import is_gguf
from selfrag_jax.gguf_files.weights import GgufWeights
from selfrag_jax.huggingface.adapter_config import is_adapter
from selfrag_jax.huggingface.adapters import AdaptedWeights
from selfrag_jax.huggingface.config_json import config_from_json, config_to_json
from selfrag_jax.huggingface.weight_files import (
    CONFIG,
    EMBEDDING,
    HEAD,
    INDEX,
    WEIGHTS,
    ModelWeights,
    WeightFiles,
)
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params, flatten, unflatten
from selfrag_jax.text.tokenizer import Tokenizer

SHARD_BYTES = 2 * 2**30  # of an exported shard

_BLOCKS = {
    "self_attn": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    "mlp": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}
# Our path within a layer -> Hugging Face's name within `model.layers.{i}.`
LAYER_TABLE: dict[tuple[str, ...], str] = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    **{
        (ours, leaf): f"{block}.{theirs}.{suffix}"
        for block, projections in _BLOCKS.items()
        for ours, theirs in projections.items()
        for leaf, suffix in (("kernel", "weight"), ("bias", "bias"))
    },
}
# Our path outside the layers -> Hugging Face's name
TOP_TABLE: dict[tuple[str, ...], str] = {
    ("embed", "embedding"): EMBEDDING,
    ("norm", "scale"): "model.norm.weight",
    ("head", "kernel"): HEAD,
}
_TRANSPOSED = "kernel"  # leaves that Hugging Face stores as [outputs, inputs]


# ---- reading tensors -------------------------------------------------------------------------
def tensor_names(path: tuple[str, ...], c: LlamaConfig) -> list[str]:
    """Hugging Face's names of the tensors of one array of ours: one, or one per layer."""
    if path[0] == "layers":
        return [f"model.layers.{i}.{LAYER_TABLE[path[1:]]}" for i in range(c.num_layers)]
    return [TOP_TABLE[path]]


def stored_names(files: ModelWeights, path: tuple[str, ...], c: LlamaConfig) -> list[str]:
    """The same as they are stored: of a tied table, some folders have only the head."""
    names = tensor_names(path, c)
    has_only_head = EMBEDDING not in files.file_of and HEAD in files.file_of
    return [HEAD] if c.tie_embeddings and names == [EMBEDDING] and has_only_head else names


def read_leaf(
    files: ModelWeights, path: tuple[str, ...], c: LlamaConfig, shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """The parts of one array of ours, in order: its layers one by one, or the array itself.

    shape: of the whole array.
    """
    part_shape = shape[1:] if path[0] == "layers" else shape
    for name in stored_names(files, path, c):
        if path[-1] == _TRANSPOSED:
            yield files.tensor(name, part_shape[::-1]).T
        else:
            yield files.tensor(name, part_shape)


def read_params(
    files: ModelWeights, c: LlamaConfig, shapes: Params, dtype: str = "float32"
) -> Params:
    """All parameters in host memory. shapes: from Model.shapes."""

    def read(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, dtype)
        for i, part in enumerate(read_leaf(files, path, c, shape)):
            out[i if path[0] == "layers" else ...] = part
        return out

    check_names(files, [path for path, _ in flatten(shapes)], c)
    return unflatten((path, read(path, leaf.shape)) for path, leaf in flatten(shapes))


def check_names(files: ModelWeights, paths: Iterable[tuple[str, ...]], c: LlamaConfig) -> None:
    """Raises UserError for a tensor that the model has no place for: none is silently dropped."""
    known = {name for path in paths for name in stored_names(files, path, c)}
    # Some folders store the tied table twice.
    if c.tie_embeddings and HEAD in files.file_of and EMBEDDING in files.file_of:
        known.add(HEAD)
        shape = (c.vocab_size, c.embed_dim)
        if not np.array_equal(files.tensor(HEAD, shape), files.tensor(EMBEDDING, shape)):
            raise UserError(
                f"{files.folder}: {CONFIG} says tie_word_embeddings, but {HEAD!r} is not "
                f"{EMBEDDING!r}"
            )
    for name in sorted(set(files.file_of) - known):
        if not name.endswith("rotary_emb.inv_freq"):  # a constant, stored by early versions
            raise UserError(
                f"{files.folder / files.file_of[name]}: tensor {name!r} has no place in the model "
                f"of {CONFIG}"
            )


# ---- writing tensors -------------------------------------------------------------------------
def tensors_of(
    path: tuple[str, ...], c: LlamaConfig, parts: Iterable[np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors of one array of ours, given its parts: its layers, or the array itself."""
    for name, part in zip(tensor_names(path, c), parts, strict=True):
        part = np.asarray(part)
        yield name, np.ascontiguousarray(part.T if path[-1] == _TRANSPOSED else part)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int | None = None
) -> None:
    """Writes tensors as they come: one file, or shards with an index.

    shard_bytes: about the size of a shard; None: SHARD_BYTES. All files get temporary names and are
    renamed at the end; the index is written last.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    shard_bytes = shard_bytes or SHARD_BYTES
    shards: list[Path] = []  # under their temporary names
    shard_of: dict[str, int] = {}
    pending: dict[str, np.ndarray] = {}  # tensors of the next shard
    total_bytes = 0

    def write_shard() -> None:
        shards.append(folder / f".shard-{len(shards)}.tmp")
        shard_of.update(dict.fromkeys(pending, len(shards) - 1))
        try:
            save_file(pending, shards[-1], metadata={"format": "pt"})
        except SafetensorError as e:  # the disk is full, for example
            raise OSError(f"{folder}: weights could not be written ({e})") from e
        pending.clear()

    try:
        for name, value in tensors:
            if pending and sum(v.nbytes for v in pending.values()) + value.nbytes > shard_bytes:
                write_shard()
            pending[name] = value
            total_bytes += value.nbytes
        write_shard()
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            names = [WEIGHTS]
        for temporary, name in zip(shards, names, strict=True):
            os.replace(temporary, folder / name)
        # Files of an earlier export, which a reader would prefer.
        for stale in {folder / WEIGHTS, folder / INDEX} - {folder / name for name in names}:
            stale.unlink(missing_ok=True)
    finally:
        for temporary in shards:
            temporary.unlink(missing_ok=True)
    if len(names) > 1:
        weight_map = {tensor: names[i] for tensor, i in shard_of.items()}
        metadata = {"total_size": total_bytes}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def save_folder(
    folder: str | Path,
    c: LlamaConfig,
    params: Params,
    tokenizer: Tokenizer,
    dtype: str = "float32",
) -> None:
    """Writes weights, tokenizer and config.json: a folder that `transformers` loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in flatten(params):
            array = np.asarray(leaf).astype(dtype, copy=False)
            yield from tensors_of(path, c, array if path[0] == "layers" else [array])

    write_tensors(folder, tensors())
    write_config_and_tokenizer(folder, c, tokenizer, dtype)


def write_config_and_tokenizer(
    folder: Path, c: LlamaConfig, tokenizer: Tokenizer, dtype: str
) -> None:
    """Writes what makes a model of the weights: the tokenizer and, last, config.json."""
    tokenizer.save(folder)
    write_json(folder / CONFIG, config_to_json(c, tokenizer.config_ids(), dtype))
    for file in folder.glob("model*.safetensors"):
        # safetensors creates files that only their owner can read.
        shutil.copymode(folder / CONFIG, file)


# ---- whole folders ---------------------------------------------------------------------------
def is_model(path: Path) -> bool:
    """Whether a path is a model in Hugging Face's format, a PEFT adapter of one, or a GGUF file."""
    return (path / CONFIG).is_file() or is_adapter(path) or is_gguf(path)


def open_folder(path: str | Path) -> tuple[LlamaConfig, ModelWeights]:
    """The config of a folder or a GGUF file, and its weights, which are not read yet.

    An adapter's are merged. Raises UserError naming the file, field or tensor at fault.
    """
    path = Path(path)
    if not is_gguf(path) and is_adapter(path):
        adapted = AdaptedWeights(path, _open_plain)
        return adapted.config, adapted
    return _open_plain(path)


def _open_plain(path: Path) -> tuple[LlamaConfig, ModelWeights]:
    """The config and the weights of a folder that is no adapter, or of a GGUF file."""
    if is_gguf(path):
        c = architecture.read_config(path)
        return c, GgufWeights(architecture.open_llama(path), c)
    return config_from_json(path / CONFIG), WeightFiles(path)


def read_config(path: str | Path) -> LlamaConfig:
    """The config alone. Raises UserError naming the file or field at fault."""
    path = Path(path)
    if is_gguf(path):
        return architecture.read_config(path)
    if is_adapter(path):
        return AdaptedWeights(path, _open_plain).config
    return config_from_json(path / CONFIG)


def load_folder(folder: str | Path) -> tuple[LlamaConfig, Params]:
    """Config and parameters (f32) of a folder.

    Raises UserError naming the file, field or tensor at fault.
    """
    c, files = open_folder(folder)
    return c, read_params(files, c, Model(c).shapes())
