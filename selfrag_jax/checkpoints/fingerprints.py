"""Fingerprints of arrays, to check that what is read is what was saved.

Each element's bits are mixed with the element's flat index (the finalizer of MurmurHash3), and the
results are summed modulo 2^32. The mixing is a bijection, so changing one element always changes
the fingerprint; any other change goes unnoticed with probability 2^-32. The sum is independent of
order: devices compute it where the array is, with the same result on every mesh.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_INDEX_FACTOR, _FACTOR_1, _FACTOR_2 = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35
_HOST_BLOCK = 1 << 22  # elements that are mixed at a time on the host


def _mix(bits, index):
    """Mixes uint32 arrays of jax or numpy."""
    uint32 = bits.dtype.type
    x = bits ^ (index * uint32(_INDEX_FACTOR))
    x = (x ^ (x >> uint32(16))) * uint32(_FACTOR_1)
    x = (x ^ (x >> uint32(13))) * uint32(_FACTOR_2)
    return x ^ (x >> uint32(16))


@partial(jax.jit, static_argnames=("row_by_row",))
def _fingerprint_all(arrays: list[jax.Array], row_by_row: bool = False) -> jax.Array:
    """The fingerprints of all arrays, [number of arrays], in one program.

    Each needs a collective, and collectives of separate programs could overtake each other.
    row_by_row: for one device. On a CPU the mixed bits of whole arrays would be written to memory,
    as much again as the arrays; row by row it is also five times as fast.
    """

    def fingerprint(x, first: Any = 0):
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        index = jnp.full(x.shape, first, jnp.uint32)
        for axis, size in enumerate(x.shape):  # uint32 wraps around, modulo 2^32
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(_mix(bits, index), dtype=jnp.uint32)

    def of_rows(x):
        def add(carry, row):
            total, i = carry
            return (total + fingerprint(row, i), i + jnp.uint32(1)), None

        return jax.lax.scan(add, (jnp.uint32(0), jnp.uint32(0)), x)[0][0]

    return jnp.stack([of_rows(x) if row_by_row and x.ndim > 1 else fingerprint(x) for x in arrays])


def tree_fingerprints(tree: Any) -> dict[str, int]:
    """The fingerprint of every array of a tree on devices, keyed by the array's path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [array for _, array in leaves]
    on_one_device = all(len(x.sharding.device_set) == 1 for x in arrays)
    values = jax.device_get(_fingerprint_all(arrays, row_by_row=on_one_device))
    return {
        jax.tree_util.keystr(path): int(value)
        for (path, _), value in zip(leaves, values, strict=True)
    }


def part_fingerprint(part: np.ndarray, offset: int = 0) -> int:
    """What a part of a host array adds to the array's fingerprint.

    offset: the flat index at which the part starts in the array.
    """
    bits = np.ascontiguousarray(part).reshape(-1).view(f"uint{8 * part.dtype.itemsize}")
    total = 0
    for start in range(0, bits.size, _HOST_BLOCK):
        block = bits[start : start + _HOST_BLOCK].astype(np.uint32)
        index = np.arange(block.size, dtype=np.uint64) + np.uint64(offset + start)
        total += int(_mix(block, index.astype(np.uint32)).sum(dtype=np.uint64))
    return total % 2**32


class RunningFingerprint:
    """The fingerprint of an array that is read part by part, in order."""

    def __init__(self):
        self._total = 0
        self._size = 0

    def update(self, part: np.ndarray) -> None:
        self._total += part_fingerprint(part, self._size)
        self._size += part.size

    @property
    def value(self) -> int:
        return self._total % 2**32


def path_name(path: tuple[str, ...]) -> str:
    """The name that `tree_fingerprints` gives to a path of nested dicts."""
    return "".join(f"[{key!r}]" for key in path)
