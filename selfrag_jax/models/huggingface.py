"""Llama-family folders in Hugging Face's format: config.json, safetensors (one file or shards with an index).

One table maps tensors. Hugging Face stores a linear layer as [outputs, inputs], one tensor per layer; here it is
[inputs, outputs] and the layers of a stack share one array [L, inputs, outputs]. Both rotate halves in the rotary
embedding, so no permutation.

Tensors are read one at a time (`Folder.tensor`) and written one shard at a time (`write_tensors`), so that a model need not
fit into memory to be converted.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np

from selfrag_jax.models.attention import RopeScaling
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params, build, leaves
from selfrag_jax.records import BadInput, read_json, write_json

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


# ---- config.json -----------------------------------------------------------------------------------------------------
# Fields that say nothing about the function that the model computes, or only how transformers runs or prints it.
_NEUTRAL = frozenset(
    "_name_or_path architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label initializer_range "
    "label2id output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict "
    "torch_dtype transformers_version unk_token_id use_cache".split()
)
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
    "attention_bias mlp_bias sliding_window layer_types".split()
)
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "sliding_window",
)  # fmt: skip
_EARLY_ROPE_THETA = 10_000.0  # Llama folders written before transformers 4.33 do not say it: it was a constant


def config_to_json(c: LlamaConfig, bos: int, eos: int, pad: int, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a model. Raises BadInput for a combination that neither Llama nor Mistral has there."""
    if c.sliding_window is not None and (c.attention_bias or c.mlp_bias):
        raise BadInput("Hugging Face's format has no model with both a sliding window and biases")
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
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": dtype,
    }
    more = {"sliding_window": c.sliding_window} if mistral else {"attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias}
    return row | more


def config_from_json(path: str | Path, dtype: str = "float32") -> LlamaConfig:
    """Reads a `config.json`; dtype: of activations.

    Every field is honoured or known to change nothing; BadInput names one that is missing, unknown or unsupported.
    """
    row = read_json(path)
    if not isinstance(row, dict):
        raise BadInput(f"{path}: expected the fields of a model, found a {type(row).__name__}")
    row = {k: v for k, v in row.items() if k not in _NEUTRAL}
    if missing := [n for n in _REQUIRED if n not in row]:
        raise BadInput(f"{path}: lacks {', '.join(missing)}")
    kind = row["model_type"]
    if kind not in ("llama", "mistral"):
        raise BadInput(f"{path}: model_type={kind!r} is not supported; llama and mistral are")
    for field, wanted in _FIXED.items():
        if row.get(field, wanted) != wanted:
            raise BadInput(f"{path}: {field}={row[field]!r} is not supported; only {wanted!r}")
    if unknown := sorted(set(row) - {*_REQUIRED, *_FIXED, *_READ}):
        raise BadInput(f"{path}: {unknown[0]}={row[unknown[0]]!r} is not supported: what it changes is not known here")
    for field in _COUNTS:
        if row.get(field) is not None and not (type(row[field]) is int and row[field] > 0):
            raise BadInput(f"{path}: {field}={row[field]!r}: must be a whole number above 0")
    for field in ("rms_norm_eps", "rope_theta"):
        if field in row:
            _positive(path, field, row[field])
    for field in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if not isinstance(row.get(field) or False, bool):
            raise BadInput(f"{path}: {field}={row[field]!r}: must be true or false")
    if nulls := [n for n in _REQUIRED if row[n] is None]:
        raise BadInput(f"{path}: {nulls[0]} is null")
    window = _sliding_window(path, row, kind)
    for field in ("attention_bias", "mlp_bias"):
        if kind == "mistral" and row.get(field):
            raise BadInput(f"{path}: {field}=true is not supported for model_type 'mistral'")
    heads = row["num_attention_heads"]
    if kind == "mistral" and "num_key_value_heads" not in row:
        raise BadInput(f"{path}: lacks num_key_value_heads")
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
        raise BadInput(f"{path}: {e}") from None


def _positive(path, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise BadInput(f"{path}: {field}={value!r}: must be a number above 0")
    return float(value)


def _sliding_window(path, row: dict[str, Any], kind: str) -> int | None:
    if kind == "mistral" and "sliding_window" not in row:
        raise BadInput(f"{path}: lacks sliding_window (null for none)")
    window = row.get("sliding_window")
    if kind == "llama" and window is not None:
        raise BadInput(f"{path}: sliding_window={window!r} is not supported for model_type 'llama'")
    wanted = "full_attention" if window is None else "sliding_attention"
    types = row.get("layer_types")
    if types is not None and types != [wanted] * row["num_hidden_layers"]:
        raise BadInput(f"{path}: layer_types={types!r} is not supported; all {row['num_hidden_layers']} must be {wanted!r}")
    return window


def _rope(path, row: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, which transformers 5 keeps in `rope_parameters` and earlier ones in two fields."""
    for field in ("rope_scaling", "rope_parameters"):
        if not isinstance(row.get(field) or {}, dict):
            raise BadInput(f"{path}: {field}={row[field]!r}: expected an object with a rope_type")
    forms = [dict(row.get(field) or {}) for field in ("rope_scaling", "rope_parameters")]
    for form in forms:
        if "type" in form:  # the older name
            form.setdefault("rope_type", form.pop("type"))
    given = forms[0] | forms[1]
    if row.get("rope_theta") is not None:
        forms.append({"rope_theta": row["rope_theta"]})
        given.setdefault("rope_theta", row["rope_theta"])
    for name, value in given.items():
        if other := [f[name] for f in forms if name in f and f[name] != value]:
            raise BadInput(f"{path}: says both {name}={other[0]!r} and {name}={value!r}")
    theta = _positive(path, "rope_theta", given.pop("rope_theta", _EARLY_ROPE_THETA))
    kind = given.pop("rope_type", None) or "default"
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if not isinstance(kind, str) or kind not in names:
        raise BadInput(f"{path}: rope_scaling of type {kind!r} is not supported; {', '.join(names)} are")
    if given.get("partial_rotary_factor", 1.0) == 1.0:
        given.pop("partial_rotary_factor", None)
    for name in names[kind]:
        if name not in given:
            raise BadInput(f"{path}: rope_scaling lacks {name}")
    if unknown := sorted(set(given) - set(names[kind])):
        raise BadInput(f"{path}: rope_scaling.{unknown[0]}={given[unknown[0]]!r} is not supported for type {kind!r}")
    if kind == "default":
        return theta, None
    for name in names[kind]:
        _positive(path, f"rope_scaling.{name}", given[name])
    low, high, original = (given.get(n, 0) for n in names["llama3"][1:])
    try:
        return theta, RopeScaling(kind, float(given["factor"]), float(low), float(high), int(original))
    except (ValueError, TypeError) as e:
        raise BadInput(f"{path}: {e}") from None


def _rope_scaling_to_json(s: RopeScaling | None) -> dict[str, Any] | None:
    if s is None:
        return None
    row: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind == "llama3":
        row |= {"low_freq_factor": s.low_frequency, "high_freq_factor": s.high_frequency}
        row |= {"original_max_position_embeddings": s.original_length}
    return row


# ---- folders and hub names -------------------------------------------------------------------------------------------
def local(name: str | Path) -> Path:
    """A local folder as it is; a hub name (`owner/model`) as the folder of its files, downloaded if need be.

    Raises BadInput when there is neither, or no network and no copy of an earlier download.
    """
    path = Path(name)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) or ".." in str(name):
        if not path.is_dir():
            raise BadInput(f"{path}: {'is a file' if path.exists() else 'no such folder'}; expected the folder of a model")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    files = ["*.safetensors", "*.json", "tokenizer.model"]
    try:
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" or not _hub_answers()
        folder = Path(snapshot_download(str(name), allow_patterns=files, local_files_only=offline))
        if not any(folder.glob("*.safetensors")):
            raise BadInput(f"{name}: the hub has no safetensors of it{_torch_recipe(str(name))}")
        return folder
    except HFValidationError as e:
        raise BadInput(f"{name}: no such folder, and no name of a model on the Hugging Face hub ({e})") from None
    except RepositoryNotFoundError:
        raise BadInput(f"{name}: no such folder, and the Hugging Face hub has no such model (or wants a login)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise BadInput(
            f"{name}: no such folder, and as a model of the Hugging Face hub it cannot be fetched "
            f"({'no network' if isinstance(e, LocalEntryNotFoundError) else e}); download it where there is one and give its folder"
        ) from None


def _hub_answers() -> bool:
    """Whether the hub can be reached at all: without this question, every file would wait for its own timeout."""
    from huggingface_hub.constants import ENDPOINT

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # not asked directly
    host = urlsplit(ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
        return True
    except OSError:
        return False


# ---- reading tensors -------------------------------------------------------------------------------------------------
class Folder:
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
            if not wanted or not isinstance(wanted, dict) or not all(isinstance(v, str) for v in wanted.values()):
                raise BadInput(f"{index}: has no weight_map from tensors to files")
        elif not single.is_file():
            raise BadInput(
                f"{self.folder}: no weights here; expected {WEIGHTS}, or {INDEX} with its shards{_of_torch(self.folder)}"
            )
        if wanted and single.is_file():
            raise BadInput(f"{self.folder}: holds both {WEIGHTS} and {INDEX}; remove the one that is not the model")
        names = sorted(set(wanted.values())) or [WEIGHTS]
        if missing := [n for n in names if not (self.folder / n).is_file()]:
            raise BadInput(f"{self.folder}: shard {missing[0]} is missing; {INDEX} names {len(names)} shards")
        self._open = {n: _open(self.folder / n) for n in names}
        self.file_of = {tensor: n for n in names for tensor in self._open[n].keys()}  # noqa: SIM118  no mapping
        for tensor, name in wanted.items():
            if self.file_of.get(tensor) != name:
                raise BadInput(f"{self.folder / name}: tensor {tensor!r} is missing, though {INDEX} says it is here")

    def dtype(self, names: Sequence[str]) -> str:
        """The type of some tensors, by numpy's name. Raises BadInput when one is missing, or they are of several types."""
        types = {}
        for name in names:
            if name not in self.file_of:
                raise BadInput(f"{self.folder}: tensor {name!r} is missing")
            types[self._open[self.file_of[name]].get_slice(name).get_dtype()] = name
        if len(types) > 1:
            listed = ", ".join(f"{name!r} is {kind}" for kind, name in types.items())
            raise BadInput(f"{self.folder}: layers of several types ({listed}); choose one with --dtype")
        [stored] = types
        if stored not in DTYPES.values():
            raise BadInput(
                f"{self.folder}: tensor {names[0]!r} is of type {stored}; {', '.join(DTYPES.values())} are supported"
            )
        return next(ours for ours, theirs in DTYPES.items() if theirs == stored)

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor in its own type. Raises BadInput when it is missing, of another shape or type, or not finite."""
        if name not in self.file_of:
            raise BadInput(f"{self.folder}: tensor {name!r} is missing")
        path, file = self.folder / self.file_of[name], self._open[self.file_of[name]]
        there = file.get_slice(name)
        if tuple(there.get_shape()) != shape:
            raise BadInput(f"{path}: tensor {name!r} has shape {tuple(there.get_shape())}; by {CONFIG} it should be {shape}")
        if there.get_dtype() not in DTYPES.values():
            raise BadInput(
                f"{path}: tensor {name!r} is of type {there.get_dtype()}; {', '.join(DTYPES.values())} are supported"
            )
        value = file.get_tensor(name)
        if not np.isfinite(value).all():
            raise BadInput(f"{path}: tensor {name!r} holds NaN or infinite values")
        return value


def _of_torch(folder: Path) -> str:
    """What to do where a folder, like some published ones, has its weights in torch's own format only."""
    found = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    if not found:
        return ""
    return f" (there is {found[0]}){_torch_recipe(folder)}"


def _torch_recipe(source: str | Path) -> str:
    out = f"{Path(source).name}-safetensors"
    return (
        ". Torch's own format (pytorch_model.bin) can hold any program and is not read here. Make safetensors of it, where torch "
        'and transformers are: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{source}', dtype='auto').save_pretrained('{out}')\", and copy its tokenizer files there"
    )


def _open(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except SafetensorError as e:
        raise BadInput(f"{file}: not readable as safetensors ({e}); is it truncated?") from None


def tensor_names(path: tuple[str, ...], c: LlamaConfig) -> list[str]:
    """Hugging Face's names of the tensors that make up one array of ours: one, or one for each layer."""
    if path[0] == "layers":
        return [f"model.layers.{i}.{LAYER_TABLE[path[1:]]}" for i in range(c.num_layers)]
    return [TOP_TABLE[path]]


def read_leaf(folder: Folder, path: tuple[str, ...], c: LlamaConfig, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The parts of one array of ours in order: itself, or its layers one by one. shape: of the whole array."""
    part = shape[1:] if path[0] == "layers" else shape
    for name in tensor_names(path, c):
        if path[-1] == _TRANSPOSED:
            yield folder.tensor(name, part[::-1]).T
        else:
            yield folder.tensor(name, part)


def read_params(folder: Folder, c: LlamaConfig, shapes: Params, dtype: str = "float32") -> Params:
    """All parameters in host memory. shapes: as Model.shapes gives them."""

    def read(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, dtype)
        for i, part in enumerate(read_leaf(folder, path, c, shape)):
            out[i if path[0] == "layers" else ...] = part
        return out

    check_names(folder, [path for path, _ in leaves(shapes)], c)
    return build(((path, read(path, leaf.shape)) for path, leaf in leaves(shapes)))


def check_names(folder: Folder, paths: list[tuple[str, ...]], c: LlamaConfig) -> None:
    """Raises BadInput naming a tensor that the config has no place for: nothing is dropped in silence."""
    known = {n for path in paths for n in tensor_names(path, c)}
    table, head = TOP_TABLE["embed", "embedding"], TOP_TABLE["head", "kernel"]
    if c.tie_embeddings and head in folder.file_of and table in folder.file_of:  # some folders store the tied table twice
        known.add(head)
        shape = (c.vocab_size, c.embed_dim)
        if not np.array_equal(folder.tensor(head, shape), folder.tensor(table, shape)):
            raise BadInput(f"{folder.folder}: {CONFIG} says tie_word_embeddings, but {head!r} is not {table!r}")
    for name in sorted(set(folder.file_of) - known):
        if not name.endswith("rotary_emb.inv_freq"):  # a constant, stored by early versions
            raise BadInput(f"{folder.folder / folder.file_of[name]}: tensor {name!r} has no place in the model of {CONFIG}")


# ---- writing tensors -------------------------------------------------------------------------------------------------
def tensors_of(path: tuple[str, ...], c: LlamaConfig, parts: Iterable[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Named tensors of one array of ours, given itself or its layers one by one."""
    for name, part in zip(tensor_names(path, c), parts, strict=True):
        part = np.asarray(part)
        yield name, np.ascontiguousarray(part.T if path[-1] == _TRANSPOSED else part)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int | None = None) -> None:
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
            [WEIGHTS] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
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


def save(folder: str | Path, c: LlamaConfig, params: Params, tokenizer, dtype: str = "float32") -> None:
    """Writes weights, tokenizer and config.json: a folder that `transformers` loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = ((path, np.asarray(leaf).astype(dtype, copy=False)) for path, leaf in leaves(params))
    write_tensors(folder, (pair for path, a in arrays for pair in tensors_of(path, c, a if path[0] == "layers" else [a])))
    finish(folder, c, tokenizer, dtype)


def finish(folder: Path, c: LlamaConfig, tokenizer, dtype: str) -> None:
    """What makes weights a model: the tokenizer and, last, config.json."""
    tokenizer.save(folder)
    write_json(folder / CONFIG, config_to_json(c, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, dtype))
    for file in folder.glob("model*.safetensors"):
        shutil.copymode(folder / CONFIG, file)  # safetensors makes files that only their owner can read


def load(folder: str | Path) -> tuple[LlamaConfig, Params]:
    """Config and parameters (f32) of a folder. Raises BadInput naming the file, field or tensor at fault."""
    c = config_from_json(Path(folder) / CONFIG)
    return c, read_params(Folder(folder), c, Model(c).shapes())
