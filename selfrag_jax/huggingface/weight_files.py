"""The weights of a folder in Hugging Face's format, read one tensor at a time.

They are safetensors or, where there are none, in torch's own format; one file, or shards with an
index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.files import kind_by_beginning, read_json
from selfrag_jax.huggingface.hub import torch_conversion_hint
from selfrag_jax.huggingface.torch_file import TorchFile

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FORMATS = ((WEIGHTS, INDEX), (TORCH_WEIGHTS, TORCH_INDEX))  # one file, or an index; best first
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # tensors of the vocabulary
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # ours -> safetensors'


class TensorFile(Protocol):
    """The tensors of one file by name."""

    def names(self) -> list[str]: ...
    def dtype(self, name: str) -> str: ...  # by safetensors' name
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...


class SafetensorsFile:
    """The tensors of a safetensors file. Raises UserError if it cannot be read."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="np")
        except SafetensorError as e:
            kind = kind_by_beginning(path)
            raise UserError(
                f"{path}: {kind}"
                if kind
                else f"{path}: not readable as safetensors ({e}); is it truncated? "
                "Copy or download it again"
            ) from None

    def names(self) -> list[str]:
        return list(self._file.keys())

    def dtype(self, name: str) -> str:
        return self._file.get_slice(name).get_dtype()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._file.get_tensor(name)


class ModelWeights(Protocol):
    """What reads a model's tensors: WeightFiles, or AdaptedWeights (adapters.py)."""

    folder: Path
    file_of: dict[str, str]  # tensor -> file

    def dtype(self, names: Sequence[str]) -> str: ...
    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray: ...


# ---- reading tensors -------------------------------------------------------------------------
class WeightFiles:
    """The weights of a folder by tensor name, read one at a time.

    Raises UserError naming the file at fault: no weights, a missing shard, a truncated file.
    """

    def __init__(
        self, folder: str | Path, conversion_hint: Callable[[Path], str] = torch_conversion_hint
    ):
        """conversion_hint: what to do about a file in torch's own format that is not read."""
        self.folder = Path(folder)
        index, shards, weight_map = _layout(self.folder)
        self._open = {
            n: open_tensors(self.folder / n, conversion_hint(self.folder)) for n in shards
        }
        self.file_of: dict[str, str] = {}  # tensor -> file
        for file_name, file in self._open.items():
            for name in file.names():
                if name in self.file_of and name not in weight_map:
                    self._check_same(name, self.file_of[name], file_name)
                self.file_of[name] = file_name
        for name, file_name in weight_map.items():
            if name not in self._open[file_name].names():
                raise UserError(
                    f"{self.folder / file_name}: tensor {name!r} is missing, though {index} says "
                    "it is here"
                )
        self.file_of |= weight_map

    def dtype(self, names: Sequence[str]) -> str:
        """The dtype of some tensors, by numpy's name.

        Raises UserError when one is missing, or when their dtypes differ.
        """
        example_of = {}  # dtype -> a tensor that has it
        for name in names:
            example_of[self._open[self._file_name(name)].dtype(name)] = name
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

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape. Raises UserError when it is missing."""
        return self._open[self._file_name(name)].shape(name)

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor in its own dtype.

        Raises UserError when it is missing, has another shape or an unsupported dtype, or holds a
        value that is not finite.
        """
        file_name = self._file_name(name)
        return read_tensor(self._open[file_name], self.folder / file_name, name, shape)

    def _file_name(self, tensor: str) -> str:
        if tensor not in self.file_of:
            raise UserError(f"{self.folder}: tensor {tensor!r} is missing")
        return self.file_of[tensor]

    def _check_same(self, name: str, *file_names: str) -> None:
        """Raises UserError if two shards have different tensors of one name."""
        a, b = (self._open[file_name] for file_name in file_names)
        same_kind = a.shape(name) == b.shape(name) and a.dtype(name) == b.dtype(name)
        if not same_kind or not np.array_equal(a.read(name), b.read(name)):
            raise UserError(
                f"{self.folder}: {file_names[0]} and {file_names[1]} have different tensors "
                f"{name!r}, and the index names neither"
            )


def open_tensors(path: Path, cure: str) -> TensorFile:
    """Opens a file of tensors. cure: what to do about one in torch's own format that is not read.

    Raises UserError if it is damaged.
    """
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path, cure)


def read_tensor(file: TensorFile, path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor of a file that is opened, as WeightFiles.tensor. path: of the file."""
    if file.shape(name) != shape:
        raise UserError(
            f"{path}: tensor {name!r} has shape {file.shape(name)}; by {CONFIG} it should be "
            f"{shape}"
        )
    if file.dtype(name) not in DTYPES.values():
        raise UserError(
            f"{path}: tensor {name!r} is of type {file.dtype(name)}; "
            f"{', '.join(DTYPES.values())} are supported"
        )
    value = file.read(name)
    if not np.isfinite(value).all():
        raise UserError(f"{path}: tensor {name!r} holds NaN or infinite values")
    return value


# ---- which files -----------------------------------------------------------------------------
def has_weights(folder: Path) -> bool:
    """Whether a folder has a model's weights in either format."""
    return any((folder / name).is_file() for names in FORMATS for name in names)


def _layout(folder: Path) -> tuple[str, list[str], dict[str, str]]:
    """(name of the index, files, tensor -> file by the index); safetensors come first."""
    for weights, index in FORMATS:
        single, listing = folder / weights, folder / index
        if single.is_file() and listing.is_file():
            raise UserError(
                f"{folder}: holds both {weights} and {index}; remove the one that is not the model"
            )
        if single.is_file():
            return index, [weights], {}
        if listing.is_file():
            weight_map = _read_weight_map(listing)
            shards = sorted(set(weight_map.values()))
            if missing := [n for n in shards if not (folder / n).is_file()]:
                raise UserError(
                    f"{folder}: shard {missing[0]} is missing; {index} names {len(shards)} shards"
                )
            return index, shards, weight_map
    stray = sorted(p.name for p in folder.glob("*.safetensors"))
    stray += sorted(p.name for p in folder.glob("*.bin"))
    found = f" (there is {stray[0]})" if stray else ""
    raise UserError(
        f"{folder}: no weights here; expected {WEIGHTS} or {TORCH_WEIGHTS}, or {INDEX} or "
        f"{TORCH_INDEX} with its shards{found}"
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    row = read_json(index)
    weight_map = row.get("weight_map") if isinstance(row, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map from tensors to files")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    if outside := [shard for shard in weight_map.values() if Path(shard).name != shard]:
        raise UserError(f"{index}: names {outside[0]!r}, which is no file beside it")
    return weight_map
