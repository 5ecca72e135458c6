"""Reads one file in torch's own format (pytorch_model.bin): without torch, tensor by tensor.

Since torch 1.6 such a file is a zip archive of uncompressed parts: a pickle, which lists the
tensors (tensor_pickle.py), and the raw numbers of each storage. The numbers are mapped into memory,
not read; a tensor is a view of its storage.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.files import LFS_POINTER, kind_by_beginning
from selfrag_jax.huggingface.tensor_pickle import MAX_BYTES, TensorView, read_tensor_pickle

_LISTING, _BYTE_ORDER = "/data.pkl", "byteorder"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and the extra field
# numpy's name -> safetensors'
_TYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class TorchFile:
    """The tensors of one file by name. Every method raises UserError naming the file."""

    def __init__(self, path: Path, cure: str):
        """cure: what to do about a file that is not read, as the end of a sentence."""
        self.path = path
        self._checked: set[str] = set()  # parts whose checksum was compared
        try:
            with zipfile.ZipFile(path) as archive:
                self._parts = {part.filename: part for part in archive.infolist()}
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
            if (kind := kind_by_beginning(path)) == LFS_POINTER:
                raise UserError(f"{path}: {kind}") from None
            raise UserError(f"{path}: is damaged, or of before torch 1.6{cure}") from None
        listings = [name for name in self._parts if name.endswith(_LISTING)]
        try:
            if len(listings) != 1:
                raise ValueError(f"has {len(listings)} lists of tensors")
            self._root = listings[0].removesuffix(_LISTING) + "/"
            order = self._root + _BYTE_ORDER
            if order in self._parts and bytes(self._part(order)) != b"little":
                raise ValueError("was saved on a machine with another byte order")
            listing = self._part(listings[0])[: MAX_BYTES + 1]  # more is refused
            self._views = read_tensor_pickle(listing.tobytes())
        except ValueError as e:
            raise UserError(f"{path}: not readable as tensors: {e}") from None

    def names(self) -> list[str]:
        return list(self._views)

    def dtype(self, name: str) -> str:
        """The type of a tensor, by safetensors' name."""
        return _TYPES[self._views[name].storage.dtype.name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._views[name].shape

    def read(self, name: str) -> np.ndarray:
        """One tensor: a view of the mapped file, which cannot be written to."""
        view = self._views[name]
        try:
            return self._read(view)
        except ValueError as e:
            raise UserError(f"{self.path}: tensor {name!r} is damaged: {e}") from None

    def _read(self, view: TensorView) -> np.ndarray:
        raw = self._part(f"{self._root}data/{view.storage.key}")
        itemsize = view.storage.dtype.itemsize
        if len(raw) != view.storage.size * itemsize:
            raise ValueError(f"its storage has {len(raw):,} bytes")
        numbers = raw.view(view.storage.dtype)
        count = int(np.prod([*view.shape], dtype=object))  # Python's numbers, which are exact
        last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
        # More numbers than the storage has: strides of 0, by which a small file becomes huge.
        if count > len(numbers) or (count and last >= len(numbers)):
            raise ValueError("it ends after its storage")
        strides = [s * itemsize for s in view.strides]
        return np.lib.stride_tricks.as_strided(
            numbers[view.offset :], view.shape, strides, writeable=False
        )

    def _part(self, name: str) -> np.ndarray:
        """The bytes of a part of the archive. Raises ValueError if they are not what was saved."""
        if name not in self._parts:
            raise ValueError(f"the archive has no {name!r}")
        part = self._parts[name]
        if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1:
            raise ValueError(f"{name!r} is compressed or encrypted, which torch never does")
        header = bytes(self._bytes[part.header_offset : part.header_offset + _LOCAL_HEADER.size])
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise ValueError(f"{name!r} is not where the archive says")
        start = part.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)[1:])
        raw = self._bytes[start : start + part.file_size]
        if len(raw) != part.file_size:
            raise ValueError(f"{name!r} is cut off")
        # torch can leave checksums out, as zeros.
        if name not in self._checked and part.CRC and zlib.crc32(raw.data) != part.CRC:
            raise ValueError(f"the bits of {name!r} are not those that were saved")
        self._checked.add(name)
        return raw
