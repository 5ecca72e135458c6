"""Llama-family folders in Hugging Face's format: config.json, safetensors (one file or shards with an index).

One table maps tensors. Hugging Face stores a linear layer as [outputs, inputs], one tensor per layer; here it is
[inputs, outputs] and the layers of a stack share one array [L, inputs, outputs]. Both rotate halves in the rotary
embedding, so no permutation.

Tensors are read one at a time (`Folder.tensor`) and written one shard at a time (`write_tensors`), so that a model need not
fit into memory to be converted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.huggingface.config_json import config_from_json, config_to_json
from selfrag_jax.huggingface.hub import _torch_recipe
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params, flatten, unflatten

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
SHARD_BYTES = 2 * 2**30  # of an exported shard

# our path within a layer -> Hugging Face's name within `model.layers.{i}.`
LAYER_TABLE: dict[tuple[str, str], str] = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    **{
        (ours, leaf): f"{block}.{theirs}.{suffix}"
        for block, pairs in (
            ("self_attn", (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj"))),
            ("mlp", (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj"))),
        )
        for ours, theirs in pairs
        for leaf, suffix in (("kernel", "weight"), ("bias", "bias"))
    },
}
# our path outside the layers -> Hugging Face's name
TOP_TABLE: dict[tuple[str, str], str] = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
}
_TRANSPOSED = "kernel"  # leaves that Hugging Face stores as [outputs, inputs]

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # ours -> safetensors'


# ---- reading tensors -------------------------------------------------------------------------------------------------
class WeightFiles:
    """The weights of a folder by tensor name, read one at a time.

    Raises BadInput naming the file at fault: none there, a shard that is missing or truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        wanted: dict[str, str] = {}
        if index.is_file():
            row = read_json(index)
            wanted = row.get("weight_map") if isinstance(row, dict) else None
            if (
                not wanted
                or not isinstance(wanted, dict)
                or not all(isinstance(v, str) for v in wanted.values())
            ):
                raise UserError(f"{index}: has no weight_map from tensors to files")
        elif not single.is_file():
            raise UserError(
                f"{self.folder}: no weights here; expected {WEIGHTS}, or {INDEX} with its shards{_of_torch(self.folder)}"
            )
        if wanted and single.is_file():
            raise UserError(
                f"{self.folder}: holds both {WEIGHTS} and {INDEX}; remove the one that is not the model"
            )
        names = sorted(set(wanted.values())) or [WEIGHTS]
        if missing := [n for n in names if not (self.folder / n).is_file()]:
            raise UserError(
                f"{self.folder}: shard {missing[0]} is missing; {INDEX} names {len(names)} shards"
            )
        self._open = {n: _open(self.folder / n) for n in names}
        self.file_of = {tensor: n for n in names for tensor in self._open[n].keys()}  # noqa: SIM118  no mapping
        for tensor, name in wanted.items():
            if self.file_of.get(tensor) != name:
                raise UserError(
                    f"{self.folder / name}: tensor {tensor!r} is missing, though {INDEX} says it is here"
                )

    def dtype(self, names: Sequence[str]) -> str:
        """The type of some tensors, by numpy's name. Raises BadInput when one is missing, or they are of several types."""
        types = {}
        for name in names:
            if name not in self.file_of:
                raise UserError(f"{self.folder}: tensor {name!r} is missing")
            types[self._open[self.file_of[name]].get_slice(name).get_dtype()] = name
        if len(types) > 1:
            listed = ", ".join(f"{name!r} is {kind}" for kind, name in types.items())
            raise UserError(
                f"{self.folder}: layers of several types ({listed}); choose one with --dtype"
            )
        [stored] = types
        if stored not in DTYPES.values():
            raise UserError(
                f"{self.folder}: tensor {names[0]!r} is of type {stored}; {', '.join(DTYPES.values())} are supported"
            )
        return next(ours for ours, theirs in DTYPES.items() if theirs == stored)

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor in its own type. Raises BadInput when it is missing, of another shape or type, or not finite."""
        if name not in self.file_of:
            raise UserError(f"{self.folder}: tensor {name!r} is missing")
        path, file = self.folder / self.file_of[name], self._open[self.file_of[name]]
        there = file.get_slice(name)
        if tuple(there.get_shape()) != shape:
            raise UserError(
                f"{path}: tensor {name!r} has shape {tuple(there.get_shape())}; by {CONFIG} it should be {shape}"
            )
        if there.get_dtype() not in DTYPES.values():
            raise UserError(
                f"{path}: tensor {name!r} is of type {there.get_dtype()}; {', '.join(DTYPES.values())} are supported"
            )
        value = file.get_tensor(name)
        if not np.isfinite(value).all():
            raise UserError(f"{path}: tensor {name!r} holds NaN or infinite values")
        return value


def _of_torch(folder: Path) -> str:
    """What to do where a folder, like some published ones, has its weights in torch's own format only."""
    found = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    if not found:
        return ""
    return f" (there is {found[0]}){_torch_recipe(folder)}"


def _open(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except SafetensorError as e:
        raise UserError(f"{file}: not readable as safetensors ({e}); is it truncated?") from None


def tensor_names(path: tuple[str, ...], c: LlamaConfig) -> list[str]:
    """Hugging Face's names of the tensors that make up one array of ours: one, or one for each layer."""
    if path[0] == "layers":
        return [f"model.layers.{i}.{LAYER_TABLE[path[1:]]}" for i in range(c.num_layers)]
    return [TOP_TABLE[path]]


def read_leaf(
    folder: WeightFiles, path: tuple[str, ...], c: LlamaConfig, shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """The parts of one array of ours in order: itself, or its layers one by one. shape: of the whole array."""
    part = shape[1:] if path[0] == "layers" else shape
    for name in tensor_names(path, c):
        if path[-1] == _TRANSPOSED:
            yield folder.tensor(name, part[::-1]).T
        else:
            yield folder.tensor(name, part)


def read_params(
    folder: WeightFiles, c: LlamaConfig, shapes: Params, dtype: str = "float32"
) -> Params:
    """All parameters in host memory. shapes: as Model.shapes gives them."""

    def read(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, dtype)
        for i, part in enumerate(read_leaf(folder, path, c, shape)):
            out[i if path[0] == "layers" else ...] = part
        return out

    check_names(folder, [path for path, _ in flatten(shapes)], c)
    return unflatten(((path, read(path, leaf.shape)) for path, leaf in flatten(shapes)))


def check_names(folder: WeightFiles, paths: list[tuple[str, ...]], c: LlamaConfig) -> None:
    """Raises BadInput naming a tensor that the config has no place for: nothing is dropped in silence."""
    known = {n for path in paths for n in tensor_names(path, c)}
    table, head = TOP_TABLE["embed", "embedding"], TOP_TABLE["head", "kernel"]
    if (
        c.tie_embeddings and head in folder.file_of and table in folder.file_of
    ):  # some folders store the tied table twice
        known.add(head)
        shape = (c.vocab_size, c.embed_dim)
        if not np.array_equal(folder.tensor(head, shape), folder.tensor(table, shape)):
            raise UserError(
                f"{folder.folder}: {CONFIG} says tie_word_embeddings, but {head!r} is not {table!r}"
            )
    for name in sorted(set(folder.file_of) - known):
        if not name.endswith("rotary_emb.inv_freq"):  # a constant, stored by early versions
            raise UserError(
                f"{folder.folder / folder.file_of[name]}: tensor {name!r} has no place in the model of {CONFIG}"
            )


# ---- writing tensors -------------------------------------------------------------------------------------------------
def tensors_of(
    path: tuple[str, ...], c: LlamaConfig, parts: Iterable[np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Named tensors of one array of ours, given itself or its layers one by one."""
    for name, part in zip(tensor_names(path, c), parts, strict=True):
        part = np.asarray(part)
        yield name, np.ascontiguousarray(part.T if path[-1] == _TRANSPOSED else part)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int | None = None
) -> None:
    """Writes tensors as they come: one file, or shards of about `shard_bytes` (SHARD_BYTES) with an index.

    All files get temporary names and are renamed at the end, the index last.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    shard_bytes = shard_bytes or SHARD_BYTES
    shards: list[Path] = []
    where: dict[str, int] = {}
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        shards.append(folder / f".shard-{len(shards)}.tmp")
        where.update(dict.fromkeys(held, len(shards) - 1))
        try:
            save_file(held, shards[-1], metadata={"format": "pt"})
        except SafetensorError as e:  # of a full disk, for example
            raise OSError(f"{folder}: weights could not be written ({e})") from e
        held.clear()

    try:
        for name, value in tensors:
            if held and sum(v.nbytes for v in held.values()) + value.nbytes > shard_bytes:
                flush()
            held[name] = value
            total += value.nbytes
        flush()
        names = (
            [WEIGHTS]
            if len(shards) == 1
            else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        )
        for temporary, name in zip(shards, names, strict=True):
            os.replace(temporary, folder / name)
        for stale in {folder / WEIGHTS, folder / INDEX} - {folder / name for name in names}:
            stale.unlink(missing_ok=True)  # of an earlier export: a reader would prefer it
    finally:
        for temporary in shards:
            temporary.unlink(missing_ok=True)
    if len(names) > 1:
        weight_map = {tensor: names[i] for tensor, i in where.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_folder(
    folder: str | Path, c: LlamaConfig, params: Params, tokenizer, dtype: str = "float32"
) -> None:
    """Writes weights, tokenizer and config.json: a folder that `transformers` loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = ((path, np.asarray(leaf).astype(dtype, copy=False)) for path, leaf in flatten(params))
    write_tensors(
        folder,
        (
            pair
            for path, a in arrays
            for pair in tensors_of(path, c, a if path[0] == "layers" else [a])
        ),
    )
    write_config_and_tokenizer(folder, c, tokenizer, dtype)


def write_config_and_tokenizer(folder: Path, c: LlamaConfig, tokenizer, dtype: str) -> None:
    """What makes weights a model: the tokenizer and, last, config.json."""
    tokenizer.save(folder)
    write_json(folder / CONFIG, config_to_json(c, tokenizer.config_ids(), dtype))
    for file in folder.glob("model*.safetensors"):
        shutil.copymode(
            folder / CONFIG, file
        )  # safetensors makes files that only their owner can read


def load_folder(folder: str | Path) -> tuple[LlamaConfig, Params]:
    """Config and parameters (f32) of a folder. Raises BadInput naming the file, field or tensor at fault."""
    c = config_from_json(Path(folder) / CONFIG)
    return c, read_params(WeightFiles(folder), c, Model(c).shapes())
