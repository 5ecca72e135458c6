"""The key-value cache of past tokens. Axis letters as in llama.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.lax import dynamic_update_slice
from jaxtyping import Array, Bool, Float, Int

# Stacked, or a tuple of layers (see Cache.per_layer). Keys are stored channels first because
# products with many keys read them so.
Keys = Float[Array, "L B K H S"] | tuple[Float[Array, "B K H S"], ...]
Values = Float[Array, "L B K S H"] | tuple[Float[Array, "B K S H"], ...]


class CacheConfig(Protocol):
    """What a cache needs to know of a LlamaConfig."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...


@jax.tree_util.register_dataclass
@dataclass
class Cache:
    """Keys and values of past tokens. Entries may be in any order; `positions` gives each one's."""

    k: Keys
    v: Values
    valid: Bool[Array, "B S"]  # False for padding and for entries not yet written
    positions: Int[Array, "B S"]  # of the cached tokens
    cursor: Int[Array, ""]  # the next entry to write, shared by all rows

    @classmethod
    def empty(cls, config: CacheConfig, batch: int, length: int) -> Cache:
        """Returns a cache of `batch` rows and `length` entries, none of them valid."""
        c, dtype = config, jnp.dtype(config.dtype)
        return cls(
            k=jnp.zeros((c.num_layers, batch, c.num_kv_heads, c.head_dim, length), dtype),
            v=jnp.zeros((c.num_layers, batch, c.num_kv_heads, length, c.head_dim), dtype),
            valid=jnp.zeros((batch, length), bool),
            positions=jnp.zeros((batch, length), jnp.int32),
            cursor=jnp.int32(0),
        )

    def map_arrays(self, fn: Callable[..., jax.Array], *others: Cache) -> Cache:
        """Replaces each array with fn(array, token_axis, *the others' arrays); keeps the cursor."""
        new = {}
        for name, from_end in dict(k=1, v=2, valid=1, positions=1).items():
            new[name] = jax.tree.map(
                lambda x, *more, n=from_end: fn(x, x.ndim - n, *more),
                *(getattr(cache, name) for cache in (self, *others)),
            )
        return replace(self, **new)

    def extended(self, n: int) -> Cache:
        """Appends n empty entries."""

        def pad(x, axis):
            return jnp.pad(x, [(0, n if i == axis else 0) for i in range(x.ndim)])

        return self.map_arrays(pad)

    def per_layer(self) -> Cache:
        """Holds each layer as an array of its own.

        Faster for many small steps on a CPU or a GPU: from a stack, XLA copies each layer before
        reading it, which moves more bytes than all weights have.
        """
        return replace(self, k=tuple(self.k), v=tuple(self.v))


def write_to_cache(
    k_cache: Float[Array, "... B K H S"],
    v_cache: Float[Array, "... B K S H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cursor: Int[Array, ""],
    layer: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "... B K H S"], Float[Array, "... B K S H"]]:
    """Writes the keys and values of T tokens at `cursor`; layer: which one, if they are stacked."""
    k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    k_start, v_start = (0, 0, 0, cursor), (0, 0, cursor, 0)
    if layer is None:
        return (
            dynamic_update_slice(k_cache, k, k_start),
            dynamic_update_slice(v_cache, v, v_start),
        )
    return (
        dynamic_update_slice(k_cache, k[None], (layer, *k_start)),
        dynamic_update_slice(v_cache, v[None], (layer, *v_start)),
    )
