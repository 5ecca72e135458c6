"""Reads weights in torch's own format (pytorch_model.bin) without torch, and without running them.

Contriever and other early encoders are published in this format only. It is a zip file with a
pickle, which names the tensors, and their raw numbers. A pickle may call any function; this reader
knows the three that describe tensors, and refuses every other.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.huggingface.hub import encoder_conversion_hint

TORCH_WEIGHTS = "pytorch_model.bin"
_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),  # of position_ids, which are not read
    "IntStorage": np.dtype(np.int32),
}


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str  # of its file in the archive
    size: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_) -> _Tensor:
    return tensor


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, and only tensors are read")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"refers to {kind!r}")
        return _Storage(dtype, str(key), int(size))


class TorchWeights:
    """The weights of a folder's pytorch_model.bin by tensor name, read one at a time.

    Has what `load_bert` uses of WeightFiles.
    """

    def __init__(self, folder: str | Path):
        """Raises UserError if the file is damaged, of an older format, or asks for other things."""
        self.folder = Path(folder)
        path = self.folder / TORCH_WEIGHTS
        try:
            self._archive = zipfile.ZipFile(path)
            [listing] = [n for n in self._archive.namelist() if n.endswith("/data.pkl")]
            self._root = listing.removesuffix("data.pkl")
            with self._archive.open(listing) as f:
                tensors = _TensorUnpickler(f).load()
        except (zipfile.BadZipFile, ValueError):
            hint = encoder_conversion_hint(self.folder)
            raise UserError(f"{path}: is damaged, or of before torch 1.6{hint}") from None
        except Exception as e:  # a damaged pickle may raise anything
            raise UserError(f"{path}: not readable as tensors: {e}") from None
        if not isinstance(tensors, dict) or not all(
            isinstance(t, _Tensor) for t in tensors.values()
        ):
            raise UserError(f"{path}: holds something beside a dict of tensors")
        self._tensors: dict[str, _Tensor] = dict(tensors)
        self.file_of = dict.fromkeys(self._tensors, TORCH_WEIGHTS)  # tensor -> file

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor in its own dtype.

        Raises UserError when it is missing, has another shape, or holds a value that is not finite.
        """
        path = self.folder / TORCH_WEIGHTS
        if name not in self._tensors:
            raise UserError(f"{self.folder}: tensor {name!r} is missing")
        t = self._tensors[name]
        if t.shape != shape:
            raise UserError(
                f"{path}: tensor {name!r} has shape {t.shape}; by config.json it should be {shape}"
            )
        try:
            numbers = np.frombuffer(self._archive.read(f"{self._root}data/{t.storage.key}"),
                                    t.storage.dtype)  # fmt: skip
        except (KeyError, ValueError, zipfile.BadZipFile) as e:
            raise UserError(f"{path}: tensor {name!r} is damaged ({e})") from None
        last = t.offset + sum((n - 1) * s for n, s in zip(t.shape, t.strides, strict=True))
        if math.prod(t.shape) and not 0 <= last < len(numbers):
            raise UserError(f"{path}: tensor {name!r} is damaged: it ends after its storage")
        size = t.storage.dtype.itemsize
        value = np.lib.stride_tricks.as_strided(
            numbers[t.offset :], t.shape, [s * size for s in t.strides]
        ).copy()
        if not np.isfinite(value).all():
            raise UserError(f"{path}: tensor {name!r} holds NaN or infinite values")
        return value
