"""Low-rank adaptation (Hu et al., 2022): the weights W of the layers stay as they are, and W + A B * alpha / rank is used,
of which the small A and B are trained.

The embedding and the output head are trained whole: the rows of the reflection tokens are new, and have everything to
learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from selfrag_jax.models.params import Params, Path, flatten, unflatten

LORA_A, LORA_B = "lora_a", "lora_b"  # [L, inputs, rank] and [L, rank, outputs], beside the kernel


@dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float

    def __post_init__(self):
        if not (self.rank >= 1 and self.alpha > 0):
            raise ValueError(
                f"lora: rank={self.rank} must be at least 1, and alpha={self.alpha} above 0"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_trained(path: Path) -> bool:
    return path[-1] in (LORA_A, LORA_B) or path[0] in ("embed", "head")


def add_adapters(params: Params, shapes: Params, key: jax.Array) -> Params:
    """`params` with the adapters that `shapes` (of a model with LoRA) has. A is random, B zero: nothing changes yet."""
    have = dict(flatten(params))
    for i, (path, leaf) in enumerate(flatten(shapes)):
        if path[-1] == LORA_A:
            have[path] = np.asarray(
                jax.random.normal(jax.random.fold_in(key, i), leaf.shape) * leaf.shape[-2] ** -0.5
            )
        elif path[-1] == LORA_B:
            have[path] = np.zeros(leaf.shape, np.float32)
    return unflatten(have.items())


def split_trained(params: Params) -> tuple[Params, Params]:
    """What is trained, and what stays as it is."""
    trained = unflatten((path, leaf) for path, leaf in flatten(params) if is_trained(path))
    return trained, unflatten(
        (path, leaf) for path, leaf in flatten(params) if not is_trained(path)
    )


def join_trained(trained: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    return unflatten([*flatten(trained), *flatten(frozen)])


def merged_kernel(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, lora: LoraConfig) -> np.ndarray:
    """The kernel of one layer as a model without LoRA has it, in f32: most of an update is smaller than a step of bf16."""
    return np.asarray(kernel, np.float32) + np.asarray(a, np.float32) @ np.asarray(
        b, np.float32
    ) * np.float32(lora.scale)


def merge_adapters(params: Params, lora: LoraConfig) -> Params:
    """Parameters of the same model without LoRA, in f32 and in host memory."""
    have = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params)}
    for path in [p for p in have if p[-1] == LORA_A]:
        a, b, at = have.pop(path), have.pop((*path[:-1], LORA_B)), (*path[:-1], "kernel")
        have[at] = np.stack(
            [merged_kernel(w, *ab, lora) for w, *ab in zip(have[at], a, b, strict=True)]
        )
    return unflatten(have.items())
