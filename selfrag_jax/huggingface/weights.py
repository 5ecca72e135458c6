"""Llama-family folders in Hugging Face's format: config.json and safetensors (one file, or shards).

One table maps tensors. Hugging Face stores a linear layer as [outputs, inputs], one tensor per
layer; here it is [inputs, outputs], and the layers of a stack share one array [L, inputs, outputs].
Both rotate halves in the rotary embedding, so nothing is permuted.

Tensors are read one at a time (`WeightFiles.tensor`) and written one shard at a time
(`write_tensors`), so a model that is converted need not fit in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.huggingface.config_json import config_from_json, config_to_json
from selfrag_jax.huggingface.hub import torch_conversion_hint
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params, flatten, unflatten
from selfrag_jax.text.tokenizer import Tokenizer

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
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
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
}
_TRANSPOSED = "kernel"  # leaves that Hugging Face stores as [outputs, inputs]

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # ours -> safetensors'


# ---- reading tensors -------------------------------------------------------------------------
class WeightFiles:
    """The weights of a folder by tensor name, read one at a time.

    Raises UserError naming the file at fault: no weights, a missing shard, a truncated file.
    """

    def __init__(
        self, folder: str | Path, conversion_hint: Callable[[Path], str] = torch_conversion_hint
    ):
        """conversion_hint: what to do if the weights are only in torch's own format."""
        self.folder = Path(folder)
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        weight_map: dict[str, str] = {}  # tensor -> shard
        if index.is_file():
            weight_map = _read_weight_map(index)
            if single.is_file():
                raise UserError(
                    f"{self.folder}: holds both {WEIGHTS} and {INDEX}; remove the one that is not "
                    "the model"
                )
        elif not single.is_file():
            raise UserError(
                f"{self.folder}: no weights here; expected {WEIGHTS}, or {INDEX} with its shards"
                f"{_torch_hint(self.folder, conversion_hint)}"
            )
        shards = sorted(set(weight_map.values())) or [WEIGHTS]
        if missing := [n for n in shards if not (self.folder / n).is_file()]:
            raise UserError(
                f"{self.folder}: shard {missing[0]} is missing; {INDEX} names {len(shards)} shards"
            )
        self._open = {n: _open(self.folder / n) for n in shards}
        self.file_of: dict[str, str] = {}  # tensor -> file
        for name, file in self._open.items():
            self.file_of.update(dict.fromkeys(file.keys(), name))
        for tensor, name in weight_map.items():
            if self.file_of.get(tensor) != name:
                raise UserError(
                    f"{self.folder / name}: tensor {tensor!r} is missing, though {INDEX} says it "
                    "is here"
                )

    def dtype(self, names: Sequence[str]) -> str:
        """The dtype of some tensors, by numpy's name.

        Raises UserError when one is missing, or when their dtypes differ.
        """
        example_of = {}  # dtype -> a tensor that has it
        for name in names:
            file = self._open[self._file_name(name)]
            example_of[file.get_slice(name).get_dtype()] = name
        if len(example_of) > 1:
            listed = ", ".join(f"{name!r} is {stored}" for stored, name in example_of.items())
            raise UserError(
                f"{self.folder}: layers of several types ({listed}); choose one with --dtype"
            )
        [stored] = example_of
        for ours, theirs in DTYPES.items():
            if theirs == stored:
                return ours
        raise UserError(
            f"{self.folder}: tensor {names[0]!r} is of type {stored}; "
            f"{', '.join(DTYPES.values())} are supported"
        )

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor in its own dtype.

        Raises UserError when it is missing, has another shape or an unsupported dtype, or holds a
        value that is not finite.
        """
        file_name = self._file_name(name)
        path, file = self.folder / file_name, self._open[file_name]
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise UserError(
                f"{path}: tensor {name!r} has shape {tuple(stored.get_shape())}; by {CONFIG} it "
                f"should be {shape}"
            )
        if stored.get_dtype() not in DTYPES.values():
            raise UserError(
                f"{path}: tensor {name!r} is of type {stored.get_dtype()}; "
                f"{', '.join(DTYPES.values())} are supported"
            )
        value = file.get_tensor(name)
        if not np.isfinite(value).all():
            raise UserError(f"{path}: tensor {name!r} holds NaN or infinite values")
        return value

    def _file_name(self, tensor: str) -> str:
        if tensor not in self.file_of:
            raise UserError(f"{self.folder}: tensor {tensor!r} is missing")
        return self.file_of[tensor]


def _read_weight_map(index: Path) -> dict[str, str]:
    row = read_json(index)
    weight_map = row.get("weight_map") if isinstance(row, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map from tensors to files")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    return weight_map


def _torch_hint(folder: Path, conversion_hint: Callable[[Path], str]) -> str:
    """What to do when the weights are only in torch's own format, as in some published folders."""
    torch_files = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    if not torch_files:
        return ""
    return f" (there is {torch_files[0]}){conversion_hint(folder)}"


def _open(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except SafetensorError as e:
        raise UserError(f"{file}: not readable as safetensors ({e}); is it truncated?") from None


def tensor_names(path: tuple[str, ...], c: LlamaConfig) -> list[str]:
    """Hugging Face's names of the tensors of one array of ours: one, or one per layer."""
    if path[0] == "layers":
        return [f"model.layers.{i}.{LAYER_TABLE[path[1:]]}" for i in range(c.num_layers)]
    return [TOP_TABLE[path]]


def read_leaf(
    files: WeightFiles, path: tuple[str, ...], c: LlamaConfig, shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """The parts of one array of ours, in order: its layers one by one, or the array itself.

    shape: of the whole array.
    """
    part_shape = shape[1:] if path[0] == "layers" else shape
    for name in tensor_names(path, c):
        if path[-1] == _TRANSPOSED:
            yield files.tensor(name, part_shape[::-1]).T
        else:
            yield files.tensor(name, part_shape)


def read_params(
    files: WeightFiles, c: LlamaConfig, shapes: Params, dtype: str = "float32"
) -> Params:
    """All parameters in host memory. shapes: from Model.shapes."""

    def read(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, dtype)
        for i, part in enumerate(read_leaf(files, path, c, shape)):
            out[i if path[0] == "layers" else ...] = part
        return out

    check_names(files, [path for path, _ in flatten(shapes)], c)
    return unflatten((path, read(path, leaf.shape)) for path, leaf in flatten(shapes))


def check_names(files: WeightFiles, paths: Iterable[tuple[str, ...]], c: LlamaConfig) -> None:
    """Raises UserError for a tensor that the model has no place for: none is silently dropped."""
    known = {name for path in paths for name in tensor_names(path, c)}
    table, head = TOP_TABLE["embed", "embedding"], TOP_TABLE["head", "kernel"]
    # Some folders store the tied table twice.
    if c.tie_embeddings and head in files.file_of and table in files.file_of:
        known.add(head)
        shape = (c.vocab_size, c.embed_dim)
        if not np.array_equal(files.tensor(head, shape), files.tensor(table, shape)):
            raise UserError(
                f"{files.folder}: {CONFIG} says tie_word_embeddings, but {head!r} is not {table!r}"
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


def load_folder(folder: str | Path) -> tuple[LlamaConfig, Params]:
    """Config and parameters (f32) of a folder.

    Raises UserError naming the file, field or tensor at fault.
    """
    c = config_from_json(Path(folder) / CONFIG)
    return c, read_params(WeightFiles(folder), c, Model(c).shapes())
