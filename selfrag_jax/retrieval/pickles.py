"""Reads the published passage embeddings: pickles of (list of ids, float16 array [n, dim]).

A pickle is a program: it names functions and calls them. This reader gives it none of NumPy's. The
names with which an array is pickled stand for records that only remember what they are told; the
array is then built from them here, after its type and size are checked. Every other name is
refused, so that a file from a stranger cannot run anything.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from selfrag_jax.errors import UserError

_TYPES = r"[fiuUS]\d+"  # floats, whole numbers, text: no objects
_BYTE_ORDERS = ("<", ">", "=", "|")


class _DtypeRecord:
    """Stands for numpy.dtype: a name, and a byte order that is set afterwards."""

    def __init__(self, name: Any, *_: Any):
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        _, self.order, *fields = state
        if any(f not in (None, -1, 0) for f in fields[:3]):  # a subarray or fields
            raise pickle.UnpicklingError("holds an array of records")

    def dtype(self) -> np.dtype:
        if not re.fullmatch(_TYPES, str(self.name)) or self.order not in _BYTE_ORDERS:
            raise pickle.UnpicklingError(f"holds an array of type {self.name!r}")
        return np.dtype(self.order + self.name)


class _ArrayRecord:
    """Stands for numpy.ndarray: shape, type and bytes, which are set afterwards."""

    def __init__(self, *_: Any):
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = tuple(state)

    def array(self) -> np.ndarray:
        _, shape, record, fortran, data = self.state
        if not isinstance(record, _DtypeRecord) or not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError("holds an array that is not of numbers or text")
        dtype = record.dtype()
        if math.prod(shape) * dtype.itemsize != len(data) or min(shape, default=0) < 0:
            raise pickle.UnpicklingError(f"holds {len(data)} bytes for an array {list(shape)}")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _ArrayRecord:
    """Stands for NumPy's function of that name, of pickles of protocol 5."""
    record = _ArrayRecord()
    record.state = (1, shape, dtype, order == "F", bytes(data))
    return record


_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # an argument of _reconstruct, never called
    ("numpy", "dtype"): _DtypeRecord,
    **{(m, "_reconstruct"): _ArrayRecord for m in _MODULES},
    **{(m, "_frombuffer"): _from_buffer for m in _NUMERIC},
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"asks for {module}.{name}, and only arrays, lists and text are allowed"
                + ("; save it with protocol 4" if module == "_codecs" else "")
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refers to an object outside the file")


def read_pickled_embeddings(path: str | Path) -> tuple[list[str], Float[np.ndarray, "n dim"]]:
    """Returns the ids and vectors of one pickle.

    Raises UserError if it asks for anything but arrays, is damaged, or holds something else.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            content = _ArrayUnpickler(f).load()
        if not (isinstance(content, (tuple, list)) and len(content) == 2):
            raise UserError(f"{path}: expected a pair of ids and vectors")
        ids, vectors = (x.array() if isinstance(x, _ArrayRecord) else x for x in content)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:  # a damaged pickle may raise anything
        reason = str(e) or type(e).__name__
        raise UserError(
            f"{path}: not a pickle of embeddings that is safe to read: {reason}"
        ) from None
    is_matrix = isinstance(vectors, np.ndarray) and vectors.ndim == 2 and vectors.dtype.kind == "f"
    if not is_matrix or not isinstance(ids, (list, tuple, np.ndarray)):
        found = f"{type(ids).__name__} and {type(vectors).__name__}"
        raise UserError(f"{path}: expected n ids and an array of floats [n, dim], found {found}")
    if len(ids) != len(vectors):
        raise UserError(f"{path}: {len(ids):,} ids for {len(vectors):,} vectors")
    if not all(isinstance(i, (str, int, np.str_, np.integer)) for i in ids):
        raise UserError(f"{path}: ids must be text or whole numbers")
    return [str(i) for i in ids], vectors
