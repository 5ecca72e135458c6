"""Codes of vectors for ScaNN: a partition, codebooks, and score-aware codes (Guo et al., 2020).

ScaNN searches these codes (scann_files.py); they are computed here and not by ScaNN's own training,
because that depends on unseeded random numbers, holds a float copy of all vectors, and takes
megabytes for each leaf when it is saved. Here the same vectors give the same codes, a block of them
is in memory at a time, and an accelerator does the work where there is one.

Letters: n vectors, D dimensions, C leaves (centers of the partition), M blocks of d dimensions
each (M * d >= D, zeros behind), K = 16 centers of a block's codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from selfrag_jax.retrieval.vectors import as_float32

NUM_CODES = 16  # of a block: 4 bits
_PARTITION_STEPS = 12  # of k-means
_CODEBOOK_STEPS = 10
_CODEBOOK_SAMPLE = 20_000  # vectors that train the codebooks
_CODING_ROUNDS = 3  # of coordinate descent over the blocks
# Errors count by their effect on large inner products, those above this share of the norms'
# product (paper, Section 3.2).
_THRESHOLD = 0.2
_BLOCK = 4096  # vectors coded at once


@dataclass(frozen=True)
class Quantizer:
    """A trained partition with its codebooks."""

    centers: Float32[np.ndarray, "C D"]
    codebooks: Float32[np.ndarray, "M K d"]

    def encode(
        self, vectors: Float[np.ndarray, "n D"]
    ) -> tuple[Int32[np.ndarray, " n"], UInt8[np.ndarray, "n M"]]:
        """Returns each vector's leaf, and the codes of what the leaf's center leaves of it."""
        leaves, codes = [], []
        for i in range(0, len(vectors), _BLOCK):
            block = as_float32(vectors[i : i + _BLOCK])
            padded = np.zeros((_BLOCK, block.shape[1]), np.float32)
            padded[: len(block)] = block
            leaf, code = _encode(padded, self.centers, self.codebooks)
            leaves.append(np.asarray(leaf)[: len(block)])
            codes.append(np.asarray(code)[: len(block)])
        return np.concatenate(leaves), np.concatenate(codes)


def train_quantizer(
    sample: Float32[np.ndarray, "n D"],
    num_leaves: int,
    dims_per_block: int,
    seed: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> Quantizer:
    """Trains a partition and codebooks on a sample; the same sample and seed give the same ones.

    advance: called after each of `num_training_steps` steps.
    """
    rng = np.random.default_rng(seed)
    centers = jnp.asarray(sample[np.sort(rng.choice(len(sample), num_leaves, replace=False))])
    vectors = jnp.asarray(sample)
    length = float(np.linalg.norm(sample, axis=1).mean())
    for _ in range(_PARTITION_STEPS):
        centers = _partition_step(vectors, centers, length)
        centers.block_until_ready()
        advance(1)
    few = sample[np.sort(rng.choice(len(sample), min(len(sample), _CODEBOOK_SAMPLE), False))]
    vectors = jnp.asarray(few)
    residuals = _blocks(vectors - centers[_nearest(vectors, centers)], dims_per_block)
    starts = np.sort(rng.choice(len(few), min(len(few), NUM_CODES), replace=False))
    codebooks = _train_codebooks(residuals, residuals[:, :, np.resize(starts, NUM_CODES)])
    advance(1)
    return Quantizer(np.asarray(centers), np.asarray(codebooks))


def num_training_steps() -> int:
    return _PARTITION_STEPS + 1


# ---- the partition: k-means ----------------------------------------------------------------------
def _nearest(x: Float[Array, "n D"], centers: Float[Array, "C D"]) -> Int[Array, " n"]:
    """The center with the least squared distance to each vector; the first of equals."""
    distances = jnp.sum(centers**2, axis=1) - 2 * jnp.matmul(x, centers.T, precision="highest")
    least = jnp.min(distances, axis=1, keepdims=True)
    index = jnp.arange(len(centers))
    # Several times faster than argmin on a CPU: XLA vectorizes plain minima only.
    return jnp.min(jnp.where(distances == least, index, len(centers)), axis=1)


@jax.jit
def _partition_step(
    x: Float[Array, "n D"], centers: Float[Array, "C D"], length: float
) -> Float[Array, "C D"]:
    """One step of spherical k-means: all centers have the same length.

    Centers of different lengths draw vectors into few large leaves, and a query that ranks leaves
    by inner products prefers long centers: at equal speed this finds a fifth more of the nearest
    passages. A center without vectors stays where it is.
    """
    n, D = x.shape
    padded = jnp.pad(x, ((0, -n % _BLOCK), (0, 0))).reshape(-1, _BLOCK, D)

    def add_block(sums, block):  # block by block: distances to all centers take n * C * 4 bytes
        return sums + jax.ops.segment_sum(block, _nearest(block, centers), len(centers)), None

    sums, _ = jax.lax.scan(add_block, jnp.zeros_like(centers), padded)  # padding adds zeros
    lengths = jnp.linalg.norm(sums, axis=1, keepdims=True)
    return jnp.where(lengths > 0, sums * length / jnp.maximum(lengths, 1e-12), centers)


# ---- codebooks: k-means in every block -----------------------------------------------------------
def _blocks(x: Float[Array, "n D"], d: int) -> Float[Array, "M d n"]:
    """Vectors cut into blocks of d dimensions, zeros behind the last; n is the minor axis."""
    n, D = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -D % d)))
    return padded.reshape(n, -1, d).transpose(1, 2, 0)


@jax.jit
def _train_codebooks(
    blocks: Float[Array, "M d n"], starts: Float[Array, "M d K"]
) -> Float[Array, "M K d"]:
    def train(block_and_start):
        block, start = block_and_start

        def step(_, centers):  # [K d]
            _, code, _ = _best_code(block, None, centers, None)
            chosen = code[None] == jnp.arange(NUM_CODES)[:, None]  # [K n]
            counts = jnp.sum(chosen, axis=1)[:, None]
            sums = jnp.matmul(chosen.astype(block.dtype), block.T, precision="highest")
            return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centers)

        return jax.lax.fori_loop(0, _CODEBOOK_STEPS, step, start.T)

    return jax.lax.map(train, (blocks, starts))


# ---- codes ---------------------------------------------------------------------------------------
def _best_code(
    r: Float[Array, "d n"],
    u: Float[Array, "d n"] | None,
    codebook: Float[Array, "K d"],
    parallel: tuple[Float[Array, " n"], float] | None,
) -> tuple[Float[Array, " n"], Int[Array, " n"], Float[Array, " n"]]:
    """(cost, code, parallel error) of the best code of one block, for each vector.

    r: the residual. u: the vector's direction. parallel: the other blocks' error along u, and the
    weight of its square beside the squared error. Written as K element-wise candidates, one loop
    over n that the compiler vectorizes.
    """
    d, n = r.shape
    cost, code = jnp.full(n, jnp.inf), jnp.zeros(n, jnp.int32)
    along = jnp.zeros(n)
    for k in range(NUM_CODES):
        errors = [r[i] - codebook[k, i] for i in range(d)]
        candidate = sum(e * e for e in errors)
        projected = jnp.zeros(n) if u is None else sum(e * u[i] for i, e in enumerate(errors))
        if parallel is not None:
            others, weight = parallel
            candidate += weight * (others + projected) ** 2
        better = candidate < cost
        cost = jnp.where(better, candidate, cost)
        code = jnp.where(better, k, code)
        along = jnp.where(better, projected, along)
    return cost, code, along


@jax.jit
def _encode(
    x: Float[Array, "n D"], centers: Float[Array, "C D"], codebooks: Float[Array, "M K d"]
) -> tuple[Int[Array, " n"], UInt8[Array, "n M"]]:
    """Leaves and codes. The codes minimise |e|^2 + (eta - 1) (e.u)^2 (paper, Theorem 3.2).

    e is the error and u the direction of the vector: an error along the vector changes its large
    inner products, one across it hardly does. Starts from the nearest codes and then chooses each
    block's code anew, given the others.
    """
    d = codebooks.shape[2]
    leaf = _nearest(x, centers)
    residuals = _blocks(x - centers[leaf], d)
    norms = jnp.linalg.norm(x, axis=1, keepdims=True)
    directions = _blocks(x / jnp.maximum(norms, 1e-12), d)
    eta = _THRESHOLD**2 / ((1 - _THRESHOLD**2) / (x.shape[1] - 1))

    def nearest(total, block):
        r, u, codebook = block
        _, code, along = _best_code(r, u, codebook, None)
        return total + along, (code.astype(jnp.uint8), along)

    def choose_again(total, block):
        r, u, codebook, along = block
        others = total - along
        _, code, along = _best_code(r, u, codebook, (others, eta - 1))
        return others + along, (code.astype(jnp.uint8), along)

    def descend(state, _):
        total, (_, along) = state
        return jax.lax.scan(choose_again, total, (residuals, directions, codebooks, along)), None

    state = jax.lax.scan(nearest, jnp.zeros(len(x)), (residuals, directions, codebooks))
    (_, (codes, _)), _ = jax.lax.scan(descend, state, length=_CODING_ROUNDS)
    return leaf.astype(jnp.int32), codes.T
