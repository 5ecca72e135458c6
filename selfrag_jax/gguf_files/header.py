"""Reads what a GGUF file says before its tensors: the metadata, and where each tensor lies.

    "GGUF", version, number of tensors, number of fields
    field:   name, type, value
    tensor:  name, sizes (the fastest axis first), type, offset from the beginning of the data
    padding to a multiple of general.alignment, then the data

All numbers are little-endian; a text is its length in bytes and its UTF-8. The format is described
in github.com/ggml-org/ggml, docs/gguf.md. The `gguf` package reads it, too, but takes seconds for a
vocabulary, and a cut file ends in an error of numpy's.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.files import kind_by_beginning

SUFFIX, MAGIC = ".gguf", b"GGUF"
# Types of tensors that are read; gguf.GGMLQuantizationType has their numbers.
TENSOR_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
_VERSIONS = (2, 3)  # the same, but for big-endian files; 1 had other lengths
# Types of fields, as `struct` calls them
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_TEXT, _ARRAY = 8, 9
_MAX_AXES = 4
_DEFAULT_ALIGNMENT = 32
_PARTS = "split.count"
_COPY_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor of a GGUF file lies, and how it is stored."""

    type: str  # one of TENSOR_TYPES
    shape: tuple[int, ...]  # as numpy has it: the fastest axis last
    start: int  # in bytes from the beginning of the file
    row_bytes: int  # of one row along the last axis

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufHeader:
    """The metadata and the tensors of a GGUF file; its data are not read."""

    path: Path
    fields: dict[str, Any]  # numbers, texts, and lists of them
    tensors: dict[str, TensorEntry]


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a file in GGUF, by its name or by its first bytes."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix == SUFFIX:
        return True
    with path.open("rb") as f:
        return f.read(len(MAGIC)) == MAGIC


def read_header(path: str | Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises UserError if the file is no GGUF file, is cut off, or is one of several parts, and naming
    a tensor of a type that is not read.
    """
    path = Path(path)
    stat = path.stat()
    return _read_header(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)  # a command asks for architecture, tokenizer and tensors of the same file
def _read_header(path: Path, size: int, modified_ns: int) -> GgufHeader:
    with path.open("rb") as f:
        if f.read(len(MAGIC)) != MAGIC:
            kind = kind_by_beginning(path) or "is no GGUF file"
            raise UserError(f"{path}: {kind}")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(path, data).header()
            except (struct.error, IndexError):
                raise UserError(
                    f"{path}: is cut off within its header, after {size:,} bytes; {_COPY_AGAIN}"
                ) from None
            except (UnicodeDecodeError, RecursionError) as e:
                raise UserError(f"{path}: its header is damaged ({e}); {_COPY_AGAIN}") from None


class _Reader:
    """Reads a header from front to back. Raises struct.error or IndexError at the file's end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, len(MAGIC)

    def header(self) -> GgufHeader:
        version = self._number("I")
        if version not in _VERSIONS:
            what = "is big-endian" if version > 2**16 else f"is of version {version} of GGUF"
            raise UserError(
                f"{self.path}: {what}; little-endian files of versions 2 and 3 are read. Make it "
                "again with a newer llama.cpp"
            )
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self._text()
            fields[name] = self._value(self._number("I"))
        if (parts := fields.get(_PARTS, 1)) not in (0, 1):
            raise UserError(
                f"{self.path}: is one of {parts} parts ({_PARTS}); join them: "
                "llama-gguf-split --merge FIRST_PART OUT.gguf"
            )
        entries = [self._tensor() for _ in range(num_tensors)]
        return GgufHeader(self.path, fields, self._placed(entries, fields))

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], fields: dict[str, Any]
    ) -> dict[str, TensorEntry]:
        """The tensors by name, all of which lie within the file."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise UserError(f"{self.path}: general.alignment={alignment!r}: must be above 0")
        data_start = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, shape, type_id, offset in entries:
            try:
                kind = GGMLQuantizationType(type_id)
            except ValueError:
                raise self._unknown_type(name, f"{type_id}, which is not known") from None
            if kind.name not in TENSOR_TYPES:
                raise self._unknown_type(name, kind.name)
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block_size:
                raise UserError(
                    f"{self.path}: tensor {name!r} of shape {shape} cannot be of type {kind.name}, "
                    f"whose blocks have {block_size} values; the file is damaged"
                )
            row_bytes = shape[-1] // block_size * block_bytes
            entry = TensorEntry(kind.name, shape, data_start + offset, row_bytes)
            end = entry.start + entry.rows * row_bytes
            if end > len(self.data):
                raise UserError(
                    f"{self.path}: is cut off: it has {len(self.data):,} bytes, and tensor "
                    f"{name!r} ends at {end:,}; {_COPY_AGAIN}"
                )
            tensors[name] = entry
        return tensors

    def _unknown_type(self, name: str, kind: str) -> UserError:
        return UserError(
            f"{self.path}: tensor {name!r} is of type {kind}; {', '.join(TENSOR_TYPES)} are read"
        )

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, number of the type, offset) of a tensor."""
        name, num_axes = self._text(), self._number("I")
        if not 1 <= num_axes <= _MAX_AXES:
            raise UserError(
                f"{self.path}: tensor {name!r} has {num_axes} axes; the file is damaged"
            )
        sizes = tuple(self._number("Q") for _ in range(num_axes))
        return name, sizes[::-1], self._number("I"), self._number("Q")

    # ---- values ----------------------------------------------------------------------------------
    def _number(self, code: str) -> Any:
        [value] = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def _text(self) -> str:
        length = self._number("Q")
        if length > len(self.data) - self.at:
            raise IndexError
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            return self._array(self._number("I"), self._number("Q"))
        return self._number(self._code(kind))

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind in (_TEXT, _ARRAY):
            return [self._value(kind) for _ in range(count)]
        dtype = np.dtype(f"<{self._code(kind)}")
        end = self.at + count * dtype.itemsize
        if end > len(self.data):
            raise IndexError
        values = np.frombuffer(self.data[self.at : end], dtype)
        self.at = end
        return values.tolist()

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise UserError(
                f"{self.path}: a field has values of the unknown type {kind}; the file is damaged"
            )
        return _NUMBERS[kind]
