"""Fingerprints of arrays: whether what is read is what was saved.

Each element's bits are mixed with its place in the array (the finalizer of MurmurHash3) and summed modulo 2^32. The mixing is
one to one, so a change of one element always shows, and others with all but one chance in 2^32; the order of a sum does not
matter, so devices compute it where the array is, and it is the same on every mesh.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PLACE, _FIRST, _SECOND = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def _mix(bits, place):
    """uint32 arrays of jax or numpy."""
    kind = bits.dtype.type
    x = bits ^ (place * kind(_PLACE))
    x = (x ^ (x >> kind(16))) * kind(_FIRST)
    x = (x ^ (x >> kind(13))) * kind(_SECOND)
    return x ^ (x >> kind(16))


@jax.jit
def _of_all(arrays: list[jax.Array]) -> jax.Array:
    """Of all in one program: several that talk between processes could overtake each other."""

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(
            jnp.uint32
        )
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):  # modulo 2^32, as uint32 is
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(_mix(bits, place), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in arrays])


def tree_fingerprints(tree: Any) -> dict[str, int]:
    """Of every array of a tree on devices, by its path."""
    paths, arrays = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    return dict(
        zip(
            map(jax.tree_util.keystr, paths),
            map(int, jax.device_get(_of_all(list(arrays)))),
            strict=True,
        )
    )


def part_fingerprint(part: np.ndarray, first: int = 0) -> int:
    """The share that a part of a host array, from its flat index `first` on, has in the array's fingerprint."""
    bits = np.ascontiguousarray(part).reshape(-1).view(f"uint{8 * part.dtype.itemsize}")
    total, step = 0, 1 << 22
    for at in range(0, bits.size, step):
        some = bits[at : at + step].astype(np.uint32)
        place = (np.arange(some.size, dtype=np.uint64) + np.uint64(first + at)).astype(np.uint32)
        total += int(_mix(some, place).sum(dtype=np.uint64))
    return total % 2**32


def path_name(path: tuple[str, ...]) -> str:
    """A path of nested dicts as `of_tree` writes it."""
    return "".join(f"[{key!r}]" for key in path)
