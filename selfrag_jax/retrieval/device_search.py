"""Search on accelerators: all vectors in the memory of the devices, every query against all.

The vectors are spread by rows over all devices. Each multiplies its rows with the queries, a block
of rows at a time, and keeps its best k; then the best of all devices are gathered and sorted.
`selfrag compile --program=search` tells what fits where.

With `approximate`, a block's best are found by `jax.lax.approx_max_k` (Chern et al., 2022), which a
TPU does at the speed of its matrix units, with an expected recall of 0.95.

Letters: Q queries, n rows, D dimensions, k results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Int64

from selfrag_jax.errors import StageFailed
from selfrag_jax.models import sharding
from selfrag_jax.retrieval.vectors import VectorFiles

_AXES = sharding.AXES  # rows are split over all of them
QUERIES = 64  # in a call; fewer are padded
_ROWS_AT_ONCE = 1 << 16  # scores of one block on a device: 64 x 65,536 x 4 B = 17 MB
_APPROXIMATE_RECALL = 0.95


def search_program(mesh: Mesh, k: int, n: int, approximate: bool):
    """Returns the jitted search of n vectors, padded to `padded_rows` and split over a mesh.

    (vectors [padded, D], queries [Q, D]) -> scores and rows [Q, k] of the best, on every device.
    """
    size = mesh.size
    rows = padded_rows(n, size) // size

    def on_device(vectors: Float[Array, "rows D"], queries: Float[Array, "Q D"]):
        first = jax.lax.axis_index(_AXES) * rows
        block = min(rows, _ROWS_AT_ONCE)

        def search_block(best, i):
            part = jax.lax.dynamic_slice_in_dim(vectors, i * block, block)
            scores = jnp.einsum(
                "qd,nd->qn", queries.astype(part.dtype), part, preferred_element_type=jnp.float32
            )
            at = first + i * block + jnp.arange(block)
            scores = jnp.where(at < n, scores, -jnp.inf)
            if approximate:
                found, j = jax.lax.approx_max_k(
                    scores, min(k, block), recall_target=_APPROXIMATE_RECALL
                )
            else:
                found, j = jax.lax.top_k(scores, min(k, block))
            return _merge(best, (found, at[j]), k), None

        nothing = (
            jnp.full((len(queries), k), -jnp.inf),
            jnp.full((len(queries), k), -1, jnp.int32),
        )
        nothing = jax.lax.pcast(nothing, _AXES, to="varying")
        (scores, at), _ = jax.lax.scan(search_block, nothing, jnp.arange(rows // block))
        scores, at = (jax.lax.all_gather(x, _AXES, axis=1, tiled=True) for x in (scores, at))
        return _merge((scores[:, :0], at[:, :0]), (scores, at), k)

    split, everywhere = PartitionSpec(_AXES), PartitionSpec()
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(split, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    return jax.jit(mapped)


Best = tuple[Float[Array, "Q k"], Int[Array, "Q k"]]


def _merge(a: Best, b: Best, k: int) -> Best:
    """The best k of two results; of equals, those of `a`."""
    scores, rows = (jnp.concatenate(x, axis=1) for x in zip(a, b, strict=True))
    best, at = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(rows, at, axis=1)


def padded_rows(n: int, num_devices: int) -> int:
    """The rows of the array on the devices: whole blocks for each of them."""
    per_device = -(-n // num_devices)
    block = min(per_device, _ROWS_AT_ONCE)
    return -(-per_device // block) * block * num_devices


class DeviceSearch:
    """Vectors on all local devices, open for search. Safe to share between threads."""

    def __init__(
        self,
        vectors: Sequence[VectorFiles],
        dtype: str = "bfloat16",
        approximate: bool = False,
        devices: Sequence[jax.Device] | None = None,
    ):
        """dtype: on the devices. devices: default: all of this process.

        Raises StageFailed if they have too little memory.
        """
        devices = jax.local_devices() if devices is None else devices
        self.mesh = sharding.make_mesh(data=-1, devices=devices)
        self.n = sum(len(v) for v in vectors)
        self.approximate = approximate
        self._programs: dict[int, jax.stages.Wrapped] = {}
        rows, dim = padded_rows(self.n, self.mesh.size), vectors[0].dim
        starts = np.concatenate([[0], np.cumsum([len(v) for v in vectors])])

        def part(index: Any) -> np.ndarray:
            """The rows of one device: read from disk, zeros behind the last."""
            start, stop, _ = index[0].indices(rows)
            out = np.zeros((stop - start, dim), jnp.dtype(dtype))
            for v, offset in zip(vectors, starts, strict=False):
                i = max(start, int(offset))
                for block in v.blocks(1 << 16, i - int(offset), min(stop - int(offset), len(v))):
                    out[i - start : i - start + len(block)] = block
                    i += len(block)
            return out

        split = NamedSharding(self.mesh, PartitionSpec(_AXES))
        try:
            self.vectors = jax.make_array_from_callback((rows, dim), split, part)
            self.vectors.block_until_ready()
        except RuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            raise StageFailed(
                f"the devices cannot hold {self.n:,} x {dim} in {dtype} "
                f"({rows * dim * jnp.dtype(dtype).itemsize / 1e9:.1f} GB): use --backend=scann"
            ) from None

    def search(
        self, queries: Float32[np.ndarray, "Q D"], k: int
    ) -> tuple[Int64[np.ndarray, "Q k"], Float32[np.ndarray, "Q k"]]:
        """Returns the rows and inner products of the k best vectors of each query, best first."""
        if k not in self._programs:
            self._programs[k] = search_program(self.mesh, k, self.n, self.approximate)
        found = []
        for i in range(0, len(queries), QUERIES):
            block = queries[i : i + QUERIES]
            padded = np.zeros((QUERIES, queries.shape[1]), np.float32)
            padded[: len(block)] = block
            scores, rows = self._programs[k](self.vectors, padded)
            found.append((np.asarray(rows)[: len(block)], np.asarray(scores)[: len(block)]))
        rows, scores = (np.concatenate(x) for x in zip(*found, strict=True))
        return rows.astype(np.int64), scores
