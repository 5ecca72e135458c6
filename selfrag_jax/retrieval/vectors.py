"""Vectors on disk, memory-mapped: the folder `vectors/` of embeddings and of an index.

    vectors.json   {"rows": n, "dim": dim, "dtype": "float16", "rows_per_file": r}
    000000.npy     [r, dim], NumPy's format: rows 0 .. r-1 of the corpus
    000001.npy     the next r rows; the last file has the rest

Row i belongs to row i of the passages, whose ids are in passages.arrow (passages.py). A file is
written whole, under a temporary name first; so a file that is there is finished, and several hosts
may each write their own. Read without this package: np.load(file, mmap_mode="r").
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int64

from selfrag_jax.errors import UserError
from selfrag_jax.files import atomic_write, read_object, write_json

LAYOUT = "vectors.json"
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class VectorLayout:
    """How many vectors there are, and how they are spread over files."""

    rows: int
    dim: int
    dtype: str
    rows_per_file: int

    @property
    def num_files(self) -> int:
        return -(-self.rows // self.rows_per_file)

    def file(self, folder: Path, i: int) -> Path:
        return folder / f"{i:06d}.npy"

    def rows_of_file(self, i: int) -> tuple[int, int]:
        """The first row of file i, and the one after its last."""
        return i * self.rows_per_file, min((i + 1) * self.rows_per_file, self.rows)

    def missing(self, folder: Path) -> list[int]:
        """The files that are not written yet."""
        return [i for i in range(self.num_files) if not self.file(folder, i).is_file()]

    def write(self, folder: Path) -> None:
        write_json(folder / LAYOUT, vars(self))

    @classmethod
    def read(cls, folder: Path) -> VectorLayout:
        fields = ("rows", "dim", "dtype", "rows_per_file")
        row = read_object(folder / LAYOUT, fields)
        if min(row["rows"], row["dim"], row["rows_per_file"]) < 1:
            raise UserError(f"{folder / LAYOUT}: is damaged; make its folder again")
        return cls(**{name: row[name] for name in fields})


def write_vectors(file: Path, vectors: Float[np.ndarray, "n dim"], first_row: int) -> None:
    """Writes one file of vectors. Raises UserError naming the row of one that is not finite."""
    check_finite(vectors, file, first_row)
    with atomic_write(file, "wb") as f:
        np.save(f, vectors)


def create_array(file: Path, dtype: str, shape: tuple[int, ...]) -> np.memmap:
    """Creates a .npy file as a writable memory map whose space on disk is reserved.

    Raises OSError if the disk is full; without the reservation, writing to the map would end the
    process.
    """
    array = np.lib.format.open_memmap(file, "w+", dtype, shape)
    with open(file, "r+b") as f:
        os.posix_fallocate(f.fileno(), 0, file.stat().st_size)
    return array


def check_finite(vectors: Float[np.ndarray, "n dim"], source: Path, first_row: int) -> None:
    """Raises UserError naming a row that holds NaN or infinite values; they abort ScaNN."""
    # One product finds both at a fraction of the memory of isfinite over all elements.
    finite = np.isfinite(np.einsum("nd->n", vectors, dtype=np.float32))
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise UserError(f"{source}: row {row} holds NaN or infinite values")


def as_float32(x: Float[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """The same finite numbers as float32; twice as fast as NumPy's own cast from float16.

    Moves sign, exponent and mantissa to their places, and corrects the exponent's bias by a
    product, which is exact and also right for subnormal numbers.
    """
    if x.dtype != np.float16:
        return x.astype(np.float32, copy=False)
    bits = x.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # 0x8FFFE000
    out = bits.view(np.float32)
    out *= np.float32(2.0**112)
    return out


class VectorFiles:
    """The vectors of a folder as one read-only array [n, dim], read from disk when asked for.

    Safe to share between threads.
    """

    def __init__(self, folder: str | Path, remedy: str = "remove it and run `selfrag embed` again"):
        """remedy: ends the message about a faulty file.

        Raises UserError if a file is missing, cut off or of another shape.
        """
        self.folder = Path(folder)
        self.layout = VectorLayout.read(self.folder)
        self.files: list[np.ndarray] = []
        for i in range(self.layout.num_files):
            file = self.layout.file(self.folder, i)
            start, stop = self.layout.rows_of_file(i)
            try:
                array = np.asarray(np.load(file, mmap_mode="r"))  # a plain view is faster
            except FileNotFoundError:
                raise UserError(f"{file}: no such file; {remedy}") from None
            except (ValueError, OSError, EOFError) as e:
                raise UserError(f"{file}: is damaged or cut off ({e}); {remedy}") from None
            expected = (stop - start, self.layout.dim)
            if array.shape != expected or array.dtype != self.layout.dtype:
                raise UserError(
                    f"{file}: holds {array.dtype} {list(array.shape)}; expected "
                    f"{self.layout.dtype} {list(expected)}; {remedy}"
                )
            self.files.append(array)

    def __len__(self) -> int:
        return self.layout.rows

    @property
    def dim(self) -> int:
        return self.layout.dim

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yields rows start .. stop - 1 as stored, at most `size` at a time."""
        stop, per_file = len(self) if stop is None else stop, self.layout.rows_per_file
        while start < stop:
            file, i = self.files[start // per_file], start % per_file
            block = file[i : min(i + size, i + stop - start, len(file))]
            yield block
            start += len(block)

    def take(self, rows: Int64[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        """Returns copies of these rows as stored, each file's in the order of the disk."""
        out = np.empty((len(rows), self.dim), self.layout.dtype)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        files = ordered // self.layout.rows_per_file
        bounds = np.searchsorted(files, np.arange(len(self.files) + 1))
        for i in np.unique(files):
            at = slice(bounds[i], bounds[i + 1])
            out[order[at]] = self.files[i][ordered[at] - i * self.layout.rows_per_file]
        return out

    def largest(self, start: int, stop: int) -> Float32[np.ndarray, " dim"]:
        """Returns the largest absolute value of each dimension in rows start .. stop - 1."""
        largest = np.zeros(self.dim, np.float32)
        for block in self.blocks(1 << 14, start, stop):
            if block.dtype == np.float16:  # without the sign, the bits are in the order of values
                block = (block.view(np.uint16) & 0x7FFF).max(axis=0, keepdims=True)
                block = block.view(np.float16)
            largest = np.maximum(largest, np.abs(block).max(axis=0))
        return largest

    def sample(self, n: int, seed: int, start: int, stop: int) -> Float32[np.ndarray, "n dim"]:
        """Returns n of the rows start .. stop - 1 in their order, chosen by a seed."""
        n = min(n, stop - start)
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(stop - start, n, replace=False)) + start
        return as_float32(self.take(rows.astype(np.int64)))


def top_k(
    scores: Float32[np.ndarray, "q n"], k: int
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """Returns the columns of the k largest scores of each row, best first; ties by column."""
    q, n = scores.shape
    if k >= n:
        columns = np.broadcast_to(np.arange(n), scores.shape)
    else:
        least = np.partition(scores, n - k, axis=1)[:, n - k, None]  # the k-th best of each row
        above = scores > least
        equal = scores == least
        needed = k - above.sum(axis=1, keepdims=True)
        chosen = above | (equal & (np.cumsum(equal, axis=1) <= needed))
        columns = np.nonzero(chosen)[1].reshape(q, k)
    values = np.take_along_axis(scores, columns, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return (
        np.take_along_axis(columns, order, 1).astype(np.int64),
        np.take_along_axis(values, order, 1),
    )


def search_exactly(
    vectors: VectorFiles, queries: Float32[np.ndarray, "q dim"], k: int, block: int
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """Returns the rows and inner products of the k best vectors of each query, best first.

    Reads all vectors once, `block` rows at a time. Fewer than k are returned if there are fewer.
    """
    rows = np.zeros((len(queries), 0), np.int64)
    scores = np.zeros((len(queries), 0), np.float32)
    start = 0
    for part in vectors.blocks(block):
        at, found = top_k(queries @ as_float32(part).T, k)
        scores = np.concatenate([scores, found], axis=1)
        rows = np.concatenate([rows, at + start], axis=1)
        best, scores = top_k(scores, k)
        rows = np.take_along_axis(rows, best, 1)
        start += len(part)
    return rows, scores
